"""Tiny models whose passes cannot be masked row by row: states, positions that are counted, sparse indices."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers

import hf_hybrid
from hf_hybrid.models.host import CACHES
from tests.models_for_tests import SHARED, VOCAB

_MODEL = {**SHARED, "num_hidden_layers": 4}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_MAMBA = {"state_size": 8, "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.2}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "init_std": 0.2,
    "forced_eos_token_id": None,
}
_GRANITE = {
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    **{"layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 0},
    "shared_intermediate_size": 32,
}
_INDEXED = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "num_key_value_heads": 4, "first_k_dense_replace": 4},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
}
_NEO = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 8}

_STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": ("Qwen3_5Text Qwen3_5ForCausalLM", {**_MODEL, **_LINEAR}),
    "qwen3-next": ("Qwen3Next", {**_MODEL, **_LINEAR, **_EXPERTS}),
    "granite-4": ("GraniteMoeHybrid", {**_MODEL, **_GRANITE}),
    "lfm2": ("Lfm2", {**_MODEL, "layer_types": ["conv", "full_attention"] * 2}),
    "mamba-2": ("Mamba2", {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "falcon-mamba": ("FalconMamba", {**_MAMBA, "time_step_rank": 4}),
}


def _takes_cache(classes: str) -> bool:
    config_name, _, model_name = classes.partition(" ")
    forward = getattr(transformers, model_name or f"{config_name}ForCausalLM").forward
    return not set(CACHES).isdisjoint(inspect.signature(forward).parameters)


STATEFUL = {name: entry for name, entry in _STATES.items() if _takes_cache(entry[0])}
"""Name -> classes, sizes: layers with a state."""
OWN_CACHE = {name: entry for name, entry in _STATES.items() if name not in STATEFUL}
"""Those that have a cache of their own in this release: none in newer ones."""
COUNTED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "bart": ("Bart", _BART),
    "falcon alibi": ("Falcon", {**_MODEL, "alibi": True}),
    "gpt-neo": ("GPTNeo", {**_NEO, "attention_types": [[["global", "local"], 2]], "initializer_range": 0.2}),
}
"""The same for classes that count what their cache holds."""
EVERY = {**STATEFUL, **COUNTED, "deepseek-v3.2": ("DeepseekV32", {**_MODEL, **_INDEXED})}
STEPS = tuple({"falcon-mamba", "deepseek-v3.2"} & set(EVERY))
"""Those that read one token a pass behind their prompt."""
_SINGLE = ("bloom", "deepseek-v3.2", "qwen3-next")  # parts of them run in float32 alone


def stateful(name: str, seed: int = 3) -> Any:
    """A random model, in float64 where every part of its class can be; no token ends a text."""
    classes, sizes = (EVERY | OWN_CACHE)[name]
    config_name, _, model_name = classes.partition(" ")
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{config_name}Config")(**{**sizes, **ends})
    torch.manual_seed(seed)
    model = getattr(transformers, model_name or f"{config_name}ForCausalLM")(config)
    model = model.to(torch.float32 if name in _SINGLE else torch.float64).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1 and not any(word in key for word in ("A_log", "dt_", "norm")):
                weight.normal_(0, 0.25)
    model.generation_config.forced_eos_token_id = None
    return hf_hybrid.enable(model)
