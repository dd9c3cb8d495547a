"""Tiny random models of every served class, prompts for them and a tokenizer."""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hf_hybrid
from hf_hybrid import ControlTokens
from hf_hybrid.core.grammars.native import PlanTags

VOCAB = 61
MAX_POSITIONS = 128


def _of_config(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config)


SHARED: dict[str, Any] = {
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
    "llama": (LlamaConfig, LlamaForCausalLM, SHARED),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, SHARED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**SHARED, "head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {**SHARED, "sliding_window": None}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, _GPT2),
    "gemma": (GemmaConfig, GemmaForCausalLM, {**SHARED, "num_key_value_heads": 1, "head_dim": 16}),
}
"""Name -> configuration class, model class, sizes."""

WINDOW = 6
_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3}
_SLIDING = {**SHARED, **_MIXED, "sliding_window": WINDOW}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_TWICE = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "global_head_dim": 16}
_CHUNKED = {
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    "num_hidden_layers": 3,
    "no_rope_layers": [1, 0, 1],
    "attention_chunk_size": WINDOW,
    "intermediate_size_mlp": 48,
}

WINDOWED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    name: (CONFIG_MAPPING[kind], _of_config, sizes)
    for name, kind, sizes in (
        ("mistral window", "mistral", {**SHARED, "sliding_window": WINDOW}),
        ("gemma3", "gemma3_text", {**_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}),
        ("gemma4", "gemma4_text", {**_SLIDING, **_TWICE, **_PER_LAYER, "head_dim": 8}),
        ("gpt-oss", "gpt_oss", {**_SLIDING, **_EXPERTS, "head_dim": 8}),
        ("llama4", "llama4_text", {**SHARED, **_EXPERTS, **_CHUNKED, "head_dim": 8}),
        ("olmo3", "olmo3", _SLIDING),
        ("cohere2", "cohere2", _SLIDING),
    )
}
"""The same of models whose layers do not all look at everything. Their windows are short enough to matter."""

ATTENTION: dict[str, tuple[torch.dtype, float]] = {
    # Reordered sums of a few dozen products of order one to ten: 1e-15 relative each, two layers.
    "sdpa": (torch.float64, 1e-11),
    # The host's eager softmax is float32 whatever the dtype: 1e-7 relative each.
    "eager": (torch.float32, 2e-4),
}
"""Attention implementation -> dtype to check it in, and the difference of logits that rounding alone may cause."""


def tiny(name: str, attention: str = "sdpa", *, seed: int = 1, **changes: Any) -> Any:
    """A random model of class ``name`` in eval mode, always the same weights for a seed."""
    config_class, model_class, sizes = (MODELS | WINDOWED)[name]
    torch.manual_seed(seed)
    config = config_class(**{**sizes, **changes}, attn_implementation=attention)
    return model_class(config).to(ATTENTION.get(attention, (torch.float64, 0.0))[0]).eval()


CONTROL = ControlTokens.of(
    mask=60,
    end=40,
    filler=45,
    tags=PlanTags(
        par=41,
        topic=42,
        async_=43,
        sync=44,
        lengths=((2, 46), (3, 47), (4, 48), (6, 49), (8, 50), (12, 51)),
        depends=(52, 53, 54, 55),
    ),
)
"""Control tokens of ``hybrid`` models: 0 is padding, 1 to 39 are text."""
TEXT = range(1, 40)
"""Ids of ordinary text."""

FAVOURS: dict[int, float] = {
    CONTROL.tags.topic: 7.5,
    CONTROL.tags.async_: 4.0,
    CONTROL.noise.filler: 3.5,
    CONTROL.noise.end: 4.5,
    **dict.fromkeys((token for _, token in CONTROL.tags.lengths), 5.0),
    **dict.fromkeys(CONTROL.tags.depends, 6.0),
}
"""Logits added to control tokens: what an untrained model needs to write rounds of several parts."""


def hybrid(name: str = "llama", seed: int = 1, favours: dict[int, float] | None = None, **changes: Any) -> Any:
    """An enabled random model with mask and control tokens, float64 and sdpa.

    Args:
        name: a key of ``MODELS`` or ``WINDOWED``.
        seed: of its weights.
        favours: token id -> logit added to it by a bias of the head, so that control tokens are written at all. Text
            tokens get random ones on top: a low entropy, so that some drafts are right and some are wrong.
    """
    special = {"pad_token_id": 0, "eos_token_id": CONTROL.noise.end}
    model = tiny(name, seed=seed, **{**special, **changes})
    bias = torch.zeros(VOCAB, dtype=model.dtype)
    bias[list(TEXT)] = 2.0 * torch.randn(len(TEXT), dtype=model.dtype)
    for token, logit in (FAVOURS if favours is None else favours).items():
        bias[token] += logit
    model.get_output_embeddings().bias = torch.nn.Parameter(bias)
    model.config.hf_hybrid = {
        "mask_token_id": CONTROL.noise.mask,
        "par": CONTROL.tags.par,
        "topic": CONTROL.tags.topic,
        "async": CONTROL.tags.async_,
        "sync": CONTROL.tags.sync,
        "spad": CONTROL.noise.filler,
        "lengths": [list(pair) for pair in CONTROL.tags.lengths],
        "depends": list(CONTROL.tags.depends),
    }
    return hf_hybrid.enable(model)


PROMPTS = ((3, 7, 9, 2, 11), (5,), (8, 1, 1, 20, 33, 4, 9, 30), (12, 12, 6))


def left_padded(prompts: tuple[tuple[int, ...], ...] = PROMPTS) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``(batch, longest)``."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@cache
def writer(planned: bool) -> Any:
    """A model that writes rounds of parts, or one that writes more than 60 tokens of plain text."""
    return hybrid(seed=26) if planned else hybrid(seed=13, favours={CONTROL.noise.end: 1.0})


def watching(hook: Any) -> Any:
    """A forward hook that is known to change nothing, so that the model is not probed for it."""

    @functools.wraps(hook)
    def watch(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    watch.row_by_row = True  # type: ignore[attr-defined]
    return watch


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of ``hybrid`` models: token i is the word ``wNN``, control tokens are special."""
    tags = {i: f"<{i}>" for i in (0, CONTROL.noise.end, *CONTROL.noise.banned)}
    vocab = {tags.get(i, f"w{i:02}"): i for i in range(VOCAB)}
    vocab["abcdef"] = vocab.pop("w59")  # StopStringCriteria spells every token behind this word
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<0>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {
        "pad_token": "<0>",
        "unk_token": "<0>",
        "eos_token": tags[CONTROL.noise.end],
        "mask_token": tags[CONTROL.noise.mask],
    }
    rest = [tags[i] for i in CONTROL.noise.banned if i != CONTROL.noise.mask]
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special, extra_special_tokens=rest)
