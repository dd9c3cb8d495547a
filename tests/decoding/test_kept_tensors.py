"""Tensors that leave a call may be kept: changed in place, or trained with, by whoever got them.

Bugs these tests catch: a tensor of inference mode in the hands of a processor, a criterion, a streamer, a drafter or
a hook, or in what is returned; autograd then refuses it much later, somewhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_hybrid import Draft, ModelDrafter, Text, generate_many
from hf_hybrid.models.host import CACHE
from tests.models_for_tests import CONTROL, PROMPTS, hybrid, tiny, writer

PROMPT = torch.tensor([[3, 7, 9, 2, 11]])
MODES: dict[str, dict[str, Any]] = {
    "autoregressive": {"strategy": "autoregressive"},
    "speculative": {"strategy": "speculative", "adaptive": False},
    "self": {"strategy": "speculative", "drafter": "self", "adaptive": False},
    "rejection": {"strategy": "speculative", "acceptance": "rejection", "do_sample": True},
    "planned": {"strategy": "planned_diffusion"},
}


def usable(tensor: Tensor) -> None:
    """As any other tensor."""
    assert not tensor.is_inference()
    if tensor.is_floating_point():
        weight = torch.ones((), dtype=tensor.dtype, requires_grad=True)
        (tensor.nan_to_num(neginf=0.0) * weight).sum().backward()
    tensor.clone()
    tensor.add_(0)


class Keeper(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Keeps all that it gets."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Any:
        self.kept += [tensor for tensor in (ids, scores) if tensor is not None]
        return scores if self.processes else torch.zeros(len(ids), dtype=torch.bool)

    processes = True

    def put(self, value: Tensor) -> None:
        self.kept.append(value)

    put_draft = put

    def end(self) -> None:
        pass


class Criterion(Keeper):
    processes = False


@pytest.mark.parametrize("mode", MODES)
def test_processors_criteria_and_streamers(mode: str) -> None:
    host = writer(mode == "planned")
    processor, criterion, streamer = Keeper(), Criterion(), Keeper()
    out = host.generate(
        PROMPT,
        logits_processor=LogitsProcessorList([processor]),
        stopping_criteria=StoppingCriteriaList([criterion]),
        streamer=streamer,
        max_new_tokens=12,
        return_dict_in_generate=True,
        return_past_key_values=True,
        **MODES[mode],
    )
    for keeper in (processor, criterion, streamer):
        assert keeper.kept
        for tensor in keeper.kept:
            usable(tensor)
    usable(out.sequences)
    for layer in getattr(out, CACHE).layers:
        usable(layer.keys)
        usable(layer.values)


def test_drafters() -> None:
    kept: list[Tensor] = []

    class Keeping(ModelDrafter):
        def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
            class Listening:
                def draw(self, logits: Tensor, *more: Any) -> Any:
                    tokens, sure, law = sampler.draw(logits, *more)
                    kept.extend(tensor for tensor in (logits, sure, law) if tensor is not None)
                    return tokens, sure, law

            return super().propose(texts, length, Listening())  # type: ignore[arg-type]

    drafter = Keeping(tiny("llama", seed=5), least_chance=0.0)
    for options in ({}, {"acceptance": "rejection", "do_sample": True}):
        writer(False).generate(PROMPT, strategy="speculative", drafter=drafter, max_new_tokens=8, **options)
    assert len(kept) > 8
    for tensor in kept:
        usable(tensor)


@pytest.mark.parametrize("mode", ["autoregressive", "speculative"])
def test_what_a_hook_sees(mode: str) -> None:
    host = hybrid(seed=13, favours={CONTROL.noise.end: 1.0})
    kept: list[Tensor] = []
    host.model.layers[0].register_forward_hook(lambda _, __, out: kept.append(out))
    host.generate(PROMPT, max_new_tokens=6, **MODES[mode])
    assert kept
    for tensor in kept:
        usable(tensor)


def test_batch_rows_change_places_outside_of_a_pass() -> None:
    """In both modes: with a hook the cache is no tensor of inference mode."""
    hooked = hybrid(seed=13, favours={CONTROL.noise.end: 1.0})
    hooked.model.layers[0].register_forward_hook(lambda _, __, out: out + 0)
    options: dict[str, Any] = {"strategy": "autoregressive", "max_new_tokens": 20, "do_sample": False}
    answers = [
        {answer.index: answer.tokens for answer in generate_many(host, PROMPTS, batch_size=2, **options)}
        for host in (writer(False), hooked)
    ]
    assert answers[0] == answers[1]


def test_a_callers_cache_is_taken_over_and_left_as_it_was() -> None:
    host = writer(False)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    first = host.generate(PROMPT, return_past_key_values=True, strategy="autoregressive", **options)
    cache = getattr(first, CACHE)
    again = host.generate(first.sequences, strategy="speculative", **{CACHE: cache}, **options)
    whole = host.generate(first.sequences, strategy="autoregressive", **options)
    assert torch.equal(again.sequences, whole.sequences)
    for layer in cache.layers:
        usable(layer.keys)
