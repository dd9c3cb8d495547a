"""``transformers serve --trust-remote-code`` where ``hf_hybrid`` cannot be imported: the column of the docs' matrix.

Bugs these tests catch: a repository whose copy of the decoding does not run in the host's server, forgets the mode of
the checkpoint, or loses the mode of a request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer

from hf_hybrid import AutoHybridModelForCausalLM
from hf_hybrid.checkpoints import bundled
from hf_hybrid.config import SETTINGS
from hf_hybrid.hub.exporting import export_model
from hf_hybrid.training.recipes.sheets import read_test_set
from tests.integration.server_for_tests import running

FOLDER = bundled("hybrid-pocket")
RECORD = next(item.sheet.prompt for item in read_test_set(FOLDER / "test_set.jsonl") if item.split == "test")
CHAT: Any = [{"role": "user", "content": RECORD}]
WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "hf_hybrid":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

sys.meta_path.insert(0, Absent())
from transformers.cli.transformers import app
app()
"""
SHOW = {"return_control_tokens": True}
"""Plans are written into the text, so that the modes differ."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "hybrid-repo"
    model = AutoHybridModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model.generation_config.hf_hybrid = {**model.generation_config.hf_hybrid, **SHOW}
    export_model(model, folder, tokenizer=tokenizer, source=FOLDER, strategy="planned_diffusion")
    return folder


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[OpenAI]:
    arguments = (str(repository), "--trust-remote-code", "--dtype", "float32")
    with running(WITHOUT, *arguments, log=repository.parent / "log") as address:
        yield OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.parametrize("strategy", [None, *SETTINGS])
def test_an_answer_is_the_one_of_the_plugin(client: OpenAI, repository: Path, strategy: str | None) -> None:
    model = AutoHybridModelForCausalLM.from_pretrained(repository, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(repository)
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**inputs, strategy=strategy)[0, inputs["input_ids"].shape[1] :]
    fields: dict[str, Any] = {}
    if strategy is not None:  # a request's config replaces the checkpoint's, so the rest of it goes along
        stored = model.generation_config.to_diff_dict()
        stored["hf_hybrid"] = {**stored["hf_hybrid"], "strategy": strategy}
        fields = {"extra_body": {"generation_config": json.dumps(stored)}}
    answer = client.chat.completions.create(model=str(repository), messages=CHAT, **fields)
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert answer.choices[0].message.content == text and len(text) > 100
    assert answer.usage is not None and answer.usage.completion_tokens == len(new)
