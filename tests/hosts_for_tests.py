"""Tiny enabled models of the host's classes, calls of them, and the strategies that write the host's own text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hf_hybrid
from tests.models_for_tests import SHARED

SIZES: dict[str, Any] = {**SHARED, "max_position_embeddings": 256, "pad_token_id": 0}
PROMPT = torch.tensor([[3, 7, 9, 2, 11, 3, 7, 9, 2, 11, 3, 7]])
ROWS = torch.tensor([[5, 9, 5, 9, 5], [3, 7, 9, 2, 11], [1, 2, 3, 4, 5]])
EXACT: dict[str, dict[str, Any]] = {
    "autoregressive": {"strategy": "autoregressive"},
    "chain": {"strategy": "speculative", "adaptive": False},
    "adaptive": {"strategy": "speculative"},
}
every_exact = pytest.mark.parametrize("how", EXACT.values(), ids=EXACT)


def tiny(kind: type = LlamaForCausalLM, seed: int = 1, **more: Any) -> Any:
    torch.manual_seed(seed)
    return hf_hybrid.enable(kind(LlamaConfig(**{**SIZES, **more})).double().eval())


def generate(model: Any, ids: Tensor = PROMPT, new: int = 16, **options: Any) -> Any:
    options = {"attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, max_new_tokens=new, do_sample=False, **options)


def refused(message: str, model: Any, ids: Tensor = PROMPT, **options: Any) -> None:
    """A ``ValueError`` that says ``message``, and no pass."""
    passes = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return inner(*args, **kwargs)

    inner, model.model.forward = model.model.forward, forward
    try:
        with pytest.raises(ValueError, match=message):
            generate(model, ids, **options)
    finally:
        del model.model.forward
    assert passes == 0
