"""Tiny random models of every served class."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 61
MAX_POSITIONS = 128

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    # Ten times the usual: with 0.02 a model of this size hardly attends, and every mask would pass every test.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": MAX_POSITIONS,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}

MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _SHARED),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, _SHARED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**_SHARED, "head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {**_SHARED, "sliding_window": None}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, _GPT2),
    "gemma": (GemmaConfig, GemmaForCausalLM, {**_SHARED, "num_key_value_heads": 1, "head_dim": 16}),
}
"""Name -> configuration class, model class, sizes."""

ATTENTION: dict[str, tuple[torch.dtype, float]] = {
    # Reordered sums of a few dozen products of order one to ten: 1e-15 relative each, two layers.
    "sdpa": (torch.float64, 1e-11),
    # The host's eager softmax is float32 whatever the dtype: 1e-7 relative each.
    "eager": (torch.float32, 2e-4),
}
"""Attention implementation -> dtype to check it in, and the difference of logits that rounding alone may cause."""


def tiny(name: str, attention: str = "sdpa", **changes: Any) -> Any:
    """A random model of class ``name`` in eval mode, always the same weights."""
    config_class, model_class, sizes = MODELS[name]
    torch.manual_seed(1)
    config = config_class(**{**sizes, **changes}, attn_implementation=attention)
    return model_class(config).to(ATTENTION.get(attention, (torch.float64, 0.0))[0]).eval()
