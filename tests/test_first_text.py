"""A planned answer of the bundled checkpoint can be read early: its text comes long before its end.

Catches: text of the first part that waits for the whole plan, or for the part's end. Passes are counted, not seconds;
``hf-hybrid bench`` measures the seconds (``seconds_to_first_text``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from hf_hybrid import AutoHybridModelForCausalLM
from hf_hybrid.checkpoints import bundled
from hf_hybrid.training.recipe import TEST_SET
from hf_hybrid.training.recipes.sheets import read_test_set
from tests.models_for_tests import watching

SHARE = 0.4
"""Of the passes of an answer, those before its first text."""


class FirstText(BaseStreamer):
    """Notes how many passes there were before the first text, and in all."""

    def __init__(self, model: Any) -> None:
        self.passes, self.first, self.puts = 0, 0, 0
        self.hook = model.model.register_forward_pre_hook(watching(self.note))

    def note(self, *_: Any) -> None:
        self.passes += 1

    def put(self, value: Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # the first is the prompt
            self.first = self.passes

    def end(self) -> None:
        self.hook.remove()


def test_the_first_text_of_four_or_more_parts_comes_early() -> None:
    folder = bundled("hybrid-pocket")
    model = AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shares: list[float] = []
    for item in [item for item in read_test_set(folder / TEST_SET) if item.split == "test"][:12]:
        streamer = FirstText(model)
        inputs = tokenizer(item.sheet.prompt, return_tensors="pt")
        output = model.generate(**inputs, strategy="planned_diffusion", streamer=streamer, return_dict_in_generate=True)
        if len(output.report[0].spans) >= 4:
            shares.append(streamer.first / streamer.passes)
    assert len(shares) >= 4 and max(shares) < SHARE, shares
