"""The models that the tests of the bench of drafting write with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_for_tests import read_checkpoint, write_checkpoint
from gguf_for_tests import tiny_llama

import hf_hybrid


@pytest.fixture(scope="module")
def model() -> Any:
    return hf_hybrid.enable(tiny_llama().double())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with held-out prompts; the draft beside it is the same with noise on its head."""
    folder = write_checkpoint(tmp_path_factory.mktemp("target"))
    draft, tokenizer, _ = read_checkpoint(folder, torch.float32)
    noise = torch.randn(draft.lm_head.weight.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        draft.lm_head.weight.add_(0.1 * noise)
    draft.save_pretrained(folder / "draft")
    tokenizer.save_pretrained(folder / "draft")
    return folder
