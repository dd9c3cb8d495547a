"""What differs between releases of transformers and between its model classes, read at run time; nobody else asks.

Names of arguments, which caches can be adopted, kinds of masks, positions, end ids, and what a class cannot do and why.
A copy travels with every exported ``custom_generate/``, which may meet newer releases than the one it was made under.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_hybrid.models.release import release_note

CACHE = "cache" if "cache" in {f.name for f in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
"""What this release calls a cache in outputs and in what it hands to a decoding loop: renamed in 5.24."""

CACHES = ("cache", "past_key_values")
"""What any release calls it; a caller may use either name."""


_Host: Any = GenerationMixin  # its methods type ``self`` by a protocol


class Unsupported(ValueError):
    """A model or a cache that the Runner cannot serve; the message says what to do."""


# Models.


def unwrapped(model: Any) -> Any:
    """The transformers model inside torch.compile and PEFT wrappers."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: Any) -> Any:
    """The config of the decoder that writes text."""
    return unwrapped(model).config.get_text_config(decoder=True)


def forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the forward of the model's class (hooks may hide them on the instance).

    A forward that passes on what it does not know (``**kwargs``) has those of the class that it extends too.
    """
    found: dict[str, inspect.Parameter] = {}
    for owner in type(unwrapped(model)).__mro__:
        forward = vars(owner).get("forward")
        if forward is None:
            continue
        own = dict(inspect.signature(inspect.unwrap(forward)).parameters)
        found = own | found
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return found


def cache_argument(model: Any) -> str:
    """What the model's forward calls its cache: the name of its own time, not always that of this release."""
    known = forward_parameters(model)
    return next((name for name in CACHES if name in known), CACHE)


_EXTRAS = ("output_router_logits", "output_attentions", "output_hidden_states")


def without_extras(model: Any) -> dict[str, bool]:
    """Arguments of the model's forward that ask for logits and cache alone, whatever its config asks for.

    With router logits a mixture of experts also computes its auxiliary loss, from a mask of the host's own shape.
    """
    known, config = forward_parameters(model), text_config(model)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return {name: False for name in _EXTRAS if name in known or (open_ended and getattr(config, name, False))}


def start_device(model: Any) -> torch.device:
    """Where a pass begins: where the embeddings lie, or, when accelerate keeps the weights elsewhere, computes them."""
    embeddings = unwrapped(model).get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    device = getattr(hook, "execution_device", None) if embeddings.weight.is_meta else None
    return torch.device(device) if device is not None else embeddings.weight.device


def mask_dtype(model: Any, device: torch.device) -> torch.dtype:
    """Of the masks of a pass, bool or additive. Eager attention reads an additive mask only; on the CPU sdpa would
    convert a boolean one in every layer."""
    additive = text_config(model)._attn_implementation == "eager" or device.type == "cpu"
    return unwrapped(model).dtype if additive else torch.bool


def trained_positions(model: Any) -> int | None:
    """Positions that the model was made for; None: its config names no number."""
    return getattr(text_config(model), "max_position_embeddings", None) or None


def position_table(model: Any) -> int | None:
    """Positions that the model can have at all: the size of a table of learned ones; None: rotary ones go on."""
    config = text_config(model)
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    return None if rotary else trained_positions(model)


@dataclass(frozen=True)
class RopeSwitch:
    """Rotary factors that change with the largest position of a pass.

    Attributes:
        positions: passes whose positions all lie below have the factors of short texts. grows: True: beyond, they go on
            changing with every position (dynamic NTK); False: they change once (LongRoPE). rereads: True: the host
            reads the text anew when it first gets there, so that all its keys have the new factors.
    """

    positions: int
    grows: bool
    rereads: bool

    def room(self, length: int) -> int | None:
        """Rows that a pass may carry behind the last of ``length`` tokens without changing what that one sees; None:
        any number."""
        if length <= self.positions:
            # At their last position the growing ones still have what a text before left behind.
            return max(0, self.positions - length - self.grows)
        return 0 if self.grows else None


def rope_switch(model: Any) -> RopeSwitch | None:
    """Where the model's rotary factors change; None: they never do."""
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    every = [rope] if "rope_type" in rope else [own for own in rope.values() if isinstance(own, Mapping)]
    found = []
    for own in every:
        kind = own.get("rope_type") or "default"
        if kind == "longrope":
            known = own.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", 0))
            found.append((int(known), False))
        elif "dynamic" in kind:
            found.append((int(config.max_position_embeddings), True))
    if not found:
        return None
    positions = min(first for first, _ in found)
    return RopeSwitch(positions, any(grows for _, grows in found), _rereads(model, positions))


def _rereads(model: Any, positions: int) -> bool:
    """True: the host drops its cache when a text reaches ``positions``: asked with a cache that has no content."""
    host = unwrapped(model)
    if getattr(host.prepare_inputs_for_generation, "__func__", None) is _Host.prepare_inputs_for_generation:
        return False
    ids = torch.zeros((1, positions + 1), dtype=torch.int64, device=host.device)
    full = DynamicCache(config=text_config(model))
    full.get_seq_length = lambda *_, **__: positions  # type: ignore[method-assign]
    options: dict[str, Any] = {CACHE: full, "next_sequence_length": 1, "use_cache": True, "is_first_iteration": False}
    handed = host.prepare_inputs_for_generation(ids, **options)
    return handed.get(CACHE) is not full


def end_ids(model: Any) -> frozenset[int]:
    """Token ids that end an answer, of the model's generation config."""
    return token_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def token_ids(value: Any) -> frozenset[int]:
    """A token id, a list of them or a tensor, as a set; empty for None. Negative ones stand for none in old configs."""
    return frozenset(ordered_ids(value))


def ordered_ids(value: Any) -> list[int]:
    """The same in their order."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    return [int(v) for v in ([value] if isinstance(value, int) else value) if int(v) >= 0]


def check_model(model: Any) -> None:
    """Refuse, before the first pass, a model whose passes would be wrong or would abort.

    Args:
        model: a loaded transformers model.

    Raises:
        Unsupported: encoder-decoder, recurrent or state-space layers, sliding or chunked attention, ALiBi, no
            ``position_ids``, an attention implementation that ignores a 4-D mask, or gradient checkpointing in
            training mode.
    """
    host = unwrapped(model)
    name, config = type(host).__name__, text_config(model)
    if getattr(host.config, "is_encoder_decoder", False):
        raise Unsupported(f"{name} is an encoder-decoder model; load a decoder-only model (AutoModelForCausalLM)")
    kinds = set(getattr(config, "layer_types", None) or ()) | set(getattr(config, "attention_layers", None) or ())
    kinds -= {"full_attention", "attention", "global", "moe", "mlp"}
    stateful = sorted(k for k in kinds if not any(word in k for word in ("sliding", "chunked", "local")))
    if getattr(host, "_is_stateful", False) or stateful:
        found = f"layers of kind {', '.join(stateful)}" if stateful else "recurrent layers"
        raise Unsupported(f"{name} has {found} without a key per token; use a model with full attention in every layer")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds or window is not None or getattr(config, "attention_chunk_size", None) is not None:
        found = f"sliding_window={window}" if window is not None else "sliding, chunked or local attention layers"
        # Classes that mix kinds of layers do not run without their window, or write another text.
        advice = "" if kinds else "; if prompt and answer stay shorter than it, load the model with sliding_window=None"
        raise Unsupported(
            f"{name} has {found}, and rows behind the window would still be seen; use a model with full attention in "
            f"every layer{advice}"
        )
    if getattr(config, "alibi", False):
        raise Unsupported(f"{name} counts keys as positions (ALiBi); use a model with rotary or learned positions")
    missing = sorted({"position_ids", "attention_mask", cache_argument(model)} - forward_parameters(model).keys())
    if missing:
        raise Unsupported(
            f"{name}.forward does not take {', '.join(missing)}; use a model whose forward does{release_note()}"
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        raise Unsupported(f'attention {attention!r} takes no mask per row; call model.set_attn_implementation("sdpa")')
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in host.modules()):
        disable = "activation_checkpointing_disable" if hasattr(host, "activation_checkpointing_disable") else ""
        raise Unsupported(
            f"{name} is in training mode with gradient checkpointing, and its layers then drop the cache; call "
            f"model.eval() before generate() (or model.{disable or 'gradient_checkpointing_disable'}())"
        )


# Caches.


def taken_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, whatever they call it; None: there is none."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def empty_cache() -> dict[str, Cache]:
    """An empty cache under its name, as the host would make it."""
    return {CACHE: DynamicCache()}


def fill(cache: Cache, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Let a ``DynamicCache`` of the caller hold these keys and values, each ``(batch, heads, length, head_dim)``."""
    for number, (keys, values) in enumerate(layers):
        layer: Any = cache.layers[number] if number < len(cache.layers) else None
        if layer is None or layer.keys is None:
            cache.update(keys, values, number)
        else:
            layer.keys, layer.values = keys, values


def adoptable(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values per layer, each ``(batch, heads, length, head_dim)``, of a cache that can be taken over.

    Raises:
        Unsupported: not a ``DynamicCache`` of full attention.
    """
    name = type(cache).__name__
    if type(cache) is not DynamicCache:
        raise Unsupported(f"cannot take over a {name}; pass a DynamicCache, or none and let the prompt be read again")
    layers: list[tuple[Tensor, Tensor]] = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            raise Unsupported(
                f"cannot take over a {type(layer).__name__}; pass a DynamicCache of full-attention layers"
            )
        if layer.keys is not None and layer.values is not None:
            layers.append((layer.keys, layer.values))
    return layers
