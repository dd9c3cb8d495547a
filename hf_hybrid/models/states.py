"""The host's caches with states: empty ones, what they hold, and the way back.

A linear layer of the host's cache holds a state of recurrence, a piece of text in front of a convolution, or both; an
attention layer holds keys. What no function here knows is refused, since it could not be put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from hf_hybrid.models.host import text_config
from hf_hybrid.models.layers import SPARSE

try:
    from transformers.cache_utils import LinearAttentionCacheLayerMixin as _Linear
    from transformers.cache_utils import LinearAttentionLayer
except ImportError:  # a release whose models with states have caches of their own
    _Linear = LinearAttentionLayer = None

_STEPS = ("mamba", "falcon_mamba", "jamba", "zamba")
"""Models whose scan of several tokens begins with an empty state, whatever was read before."""


def steps_only(model: Any) -> bool:
    """True: behind a text a pass may carry one row alone, because several would read something else: a scan that takes
    no state, or an index that chooses other keys for several rows than for one."""
    indexed = any("Indexed" in type(layer).__name__ for layer in empty_cache_of(model).layers)
    indexed = indexed or not SPARSE.isdisjoint(getattr(text_config(model), "layer_types", None) or ())
    return indexed or getattr(text_config(model), "model_type", None) in _STEPS


def empty_cache_of(model: Any) -> DynamicCache:
    """A cache of the host that keeps every key: a layer with a window would forget some, and could not be cropped. The
    window is in the host's mask."""
    cache = DynamicCache(config=text_config(model))
    for number, layer in enumerate(_layers(cache)):
        if not (getattr(layer, "is_sliding", False) and _is_known(layer)):
            continue
        if _is_linear(layer):
            from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

            whole = LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
        else:
            whole = DynamicLayer()
        cache.layers[number] = whole
    return cache


def has_states(cache: Cache) -> bool:
    """True: a layer has a state in place of a key per token."""
    return any(_is_linear(layer) for layer in _layers(cache))


def tokens_in(cache: Any) -> int:
    """Tokens that a host cache counts; 0 where it has states alone, which count nothing, or is None."""
    layers = getattr(cache, "layers", None)
    if cache is None or (layers and not any(hasattr(layer, "get_seq_length") for layer in layers)):
        return 0
    return int(cache.get_seq_length())


def unknown_layers(cache: Cache) -> list[str]:
    """Names of the classes of layers that cannot be put back."""
    return sorted({type(layer).__name__ for layer in _layers(cache) if not _is_known(layer)})


def crop(cache: Cache, count: int) -> None:
    """Forget the last ``count`` keys of every attention layer."""
    for layer in _layers(cache):
        if _is_linear(layer):
            if isinstance(layer, DynamicLayer):
                DynamicLayer.crop(layer, -count)
        elif getattr(layer, "is_initialized", True):
            layer.crop(-count)


@dataclass
class States:
    """The states of a cache behind ``length`` tokens; ``layers``: of every linear layer its two dicts of tensors."""

    length: int
    layers: list[tuple[dict[int, Tensor | None], dict[int, Tensor | None], dict[int, bool]]]

    @classmethod
    def of(cls, cache: Cache, length: int, known: States | None = None) -> States:
        """A copy of what ``cache`` holds; ``known``, where that is of the same length."""
        if known is not None and known.length == length:
            return known
        return cls(
            length,
            [
                (_copied(layer.conv_states), _copied(layer.recurrent_states), dict(layer.has_previous_state))
                for layer in _layers(cache)
                if _is_linear(layer)
            ],
        )

    def restore(self, cache: Cache) -> None:
        """Put the states back; they stay here too."""
        linear = [layer for layer in _layers(cache) if _is_linear(layer)]
        for layer, (convolved, recurrent, begun) in zip(linear, self.layers, strict=True):
            layer.conv_states, layer.recurrent_states = _copied(convolved), _copied(recurrent)
            layer.has_previous_state = dict(begun)


def length_of_states(states: States | None) -> int:
    """Tokens behind which they are; of the empty one 0."""
    return states.length if states is not None else 0


def _layers(cache: Cache) -> list[Any]:
    return list(cache.layers)


def _copied(tensors: dict[int, Tensor | None]) -> dict[int, Tensor | None]:
    return {number: tensor if tensor is None else torch.clone(tensor) for number, tensor in tensors.items()}


def _is_linear(layer: Any) -> bool:
    return _Linear is not None and isinstance(layer, _Linear)


def _is_known(layer: Any) -> bool:
    """Layers of the host's own cache module, whose parts are known; a model's own module may keep more in them."""
    return type(layer).__module__ == DynamicLayer.__module__
