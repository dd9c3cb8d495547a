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


def first_end(model: Any) -> object:
    """The end token of the generation config, else of the config, the first of several; None: there is none. What
    stands there may be no token id: anybody may have written it."""
    size = model.config.get_text_config().vocab_size
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if isinstance(eos, (list, tuple)):
            # One that is negative or beyond the vocabulary stands for none.
            eos = next((e for e in eos if not isinstance(e, int) or 0 <= e < size), eos[0] if eos else None)
        if eos is not None:
            return eos
    return None


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
