"""Refusals: what makes the passes of a model wrong, or abort, unless its Runner knows better.

Each function looks for one thing, before the first pass, and a Runner names those that hold for it.
"""

from __future__ import annotations

from typing import Any

from hf_hybrid.models.host import (
    Unsupported,
    cache_argument,
    forward_parameters,
    text_config,
    unwrapped,
)
from hf_hybrid.models.release import release_note
from hf_hybrid.models.states import empty_cache_of, unknown_layers

_STATES = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""Kinds of layers that keep a state, instead of keys or beside them."""


def refuse_encoder_decoders(model: Any) -> None:
    """Rows would need the states of an encoder."""
    host = unwrapped(model)
    if getattr(host.config, "is_encoder_decoder", False):
        name = type(host).__name__
        raise Unsupported(f"{name} is an encoder-decoder model; load a decoder-only model (AutoModelForCausalLM)")


def refuse_states(model: Any) -> None:
    """Recurrent and state-space layers have no key per token: a rejected draft could not be forgotten."""
    host = unwrapped(model)
    kinds = getattr(text_config(model), "layer_types", None) or ()
    stateful = sorted({str(kind) for kind in kinds} & _STATES)
    if getattr(host, "_is_stateful", False) or stateful:
        found = f"layers of kind {', '.join(stateful)}" if stateful else "recurrent layers"
        raise Unsupported(
            f"{type(host).__name__} has {found} without a key per token; use a model with full attention in every layer"
        )


def refuse_counted_positions(model: Any) -> None:
    """Rows have positions of their own, not at the number of keys."""
    if getattr(text_config(model), "attention_layers", None) or text_config(model).model_type == "moshi":
        # GPT-Neo and Moshi cut their windows by the number of keys.
        name = type(unwrapped(model)).__name__
        raise Unsupported(f"{name} counts keys in its window; use a model with rotary or learned positions")
    if getattr(text_config(model), "alibi", False):
        name = type(unwrapped(model)).__name__
        raise Unsupported(f"{name} counts keys as positions (ALiBi); use a model with rotary or learned positions")


def refuse_missing_arguments(model: Any, cached: bool) -> None:
    """A pass hands over positions, a mask and, where it is ``cached``, a cache."""
    wanted = {"position_ids", "attention_mask"} | ({cache_argument(model)} if cached else set())
    missing = sorted(wanted - forward_parameters(model).keys())
    if missing:
        raise Unsupported(
            f"{type(unwrapped(model)).__name__}.forward does not take {', '.join(missing)}; use a model whose forward "
            f"does{release_note()}"
        )


def refuse_attention_without_masks(model: Any) -> None:
    """Attention must take a mask of its own for every row."""
    attention = getattr(text_config(model), "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        raise Unsupported(f'attention {attention!r} takes no mask per row; call model.set_attn_implementation("sdpa")')


def refuse_checkpointing(model: Any) -> None:
    """With gradient checkpointing in training mode the layers drop the cache."""
    host = unwrapped(model)
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in host.modules()):
        disable = "activation_checkpointing_disable" if hasattr(host, "activation_checkpointing_disable") else ""
        raise Unsupported(
            f"{type(host).__name__} is in training mode with gradient checkpointing, and its layers then drop the "
            f"cache; call model.eval() before generate() (or model.{disable or 'gradient_checkpointing_disable'}())"
        )


_ELSEWHERE = {
    "recurrent_gemma": "states inside its layers",
    "rwkv": "states in an argument of its own",
    "xlstm": "a cache of its own class",
    "minimax": "a cache of its own class",
    "qwen4_exp": "states beside its cache",
    "qwen4_exp_text": "states beside its cache",
    "prophetnet": "a cache that takes one token a pass",
    "cpmant": "a prompt of its own in front of every text",
}
"""Kinds of models that keep between passes what a host cache does not show: kind -> what."""


def refuse_missing_cache(model: Any) -> None:
    """Without a cache every pass would read the whole text."""
    if cache_argument(model) not in forward_parameters(model):
        raise Unsupported(
            f"{type(unwrapped(model)).__name__}.forward takes no cache; leave out strategy=, or use another model"
            f"{release_note()}"
        )


def refuse_caches_of_their_own(model: Any) -> None:
    """What is kept where nobody can put it back would still hold a rejected draft."""
    host, kind = unwrapped(model), getattr(text_config(model), "model_type", None)
    found = _ELSEWHERE.get(str(kind), "")
    if not found:
        layers = unknown_layers(empty_cache_of(model))
        found = f"cache layers of kind {', '.join(layers)}" if layers else ""
    if found:
        raise Unsupported(
            f"{type(host).__name__} has {found}, which cannot be put back when a draft is rejected; leave out "
            "strategy=, or use another model"
        )
