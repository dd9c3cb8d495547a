"""Kinds of layers: how far the layers of a model look, as its config says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from hf_hybrid.core.rows import Reach
from hf_hybrid.models.host import Unsupported, text_config, unwrapped

Mask = TypeVar("Mask")

FULL = "full_attention"
_WITHOUT_ATTENTION = frozenset({"moe", "mlp"})
_WHOLE = frozenset({FULL, "attention", "global"}) | _WITHOUT_ATTENTION
_WINDOW, _CHUNK = "sliding_attention", "chunked_attention"


SPARSE = frozenset(
    {
        "indexed_attention",
        "deepseek_sparse_attention",  # its name in older releases
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "minimax_m3_sparse",
    }
)
"""Kinds that choose their keys by themselves, inside of a mask of the class's own."""


class ConfigFault(Unsupported):
    """A config that contradicts itself, or names what is not known: no Runner can serve the model."""


@dataclass(frozen=True)
class Layers:
    """What the layers of a model see.

    Attributes:
        reaches: kind of layer -> how far its layers look, None: everything that the row rule allows.
        by_kind: True: the forward takes a dict with the mask of every kind; False: one mask for all layers.
    """

    reaches: Mapping[str, Reach | None]
    by_kind: bool

    @cached_property
    def near(self) -> tuple[Reach, ...]:
        """Every reach but the whole."""
        return tuple(dict.fromkeys(reach for reach in self.reaches.values() if reach is not None))

    def masks(self, full: Mask, cut: Callable[[Reach], Mask]) -> Mask | dict[str, Mask]:
        """``attention_mask`` for the model's forward.

        Args:
            full: the row rule as a mask. cut: the same for the layers of one reach.
        """
        made = {reach: cut(reach) for reach in self.near}
        of = {kind: full if reach is None else made[reach] for kind, reach in self.reaches.items()}
        return of if self.by_kind else next(iter(of.values()))


WHOLE = Layers({FULL: None}, by_kind=False)
"""Every layer looks at everything."""


def layers_of(model: Any) -> Layers:
    """The kinds of layers of ``model``.

    Raises:
        Unsupported: a kind that takes no mask from outside; ``ConfigFault``: one that is not known, a window or chunk
            without a length, or more or fewer kinds than layers.
    """
    config, name = text_config(model), type(unwrapped(model)).__name__
    kinds = list(getattr(config, "layer_types", None) or ())
    if kinds and len(kinds) != config.num_hidden_layers:
        raise ConfigFault(
            f"the config of {name} names {len(kinds)} layer_types for {config.num_hidden_layers} layers; make them "
            "equal"
        )
    window, chunk = _window(config), getattr(config, "attention_chunk_size", None)
    if not kinds:
        if window is None and chunk is None:
            return WHOLE
        kind = _WINDOW if window is not None else _CHUNK
        return Layers({kind: _reach(name, kind, window, chunk)}, by_kind=False)
    unknown = sorted({str(kind) for kind in kinds} - _WHOLE - {_WINDOW, _CHUNK})
    if unknown:
        fault = Unsupported if SPARSE.issuperset(unknown) else ConfigFault
        raise fault(
            f"{name} has layers of kind {', '.join(unknown)}, whose attention is not known here; use the host's "
            "generate() (leave out strategy=)"
        )
    seen = {kind for kind in kinds if kind not in _WITHOUT_ATTENTION}
    if not seen & {_WINDOW, _CHUNK}:
        return WHOLE
    found = {kind: None if kind in _WHOLE else _reach(name, kind, window, chunk) for kind in sorted(seen | {FULL})}
    return Layers(found, by_kind=True)


def _window(config: Any) -> int | None:
    """Length of the window; None: the layers have none."""
    if not getattr(config, "use_sliding_window", True):
        return None
    window = getattr(config, "sliding_window", None)
    return window if window is not None else getattr(config, "sliding_window_size", None)


def _reach(name: str, kind: str, window: int | None, chunk: int | None) -> Reach:
    size = window if kind == _WINDOW else chunk
    field = "sliding_window" if kind == _WINDOW else "attention_chunk_size"
    if not isinstance(size, int) or size < 1:
        raise ConfigFault(f"{name} has layers of kind {kind}, and its config says {field}={size}; give it a length")
    return Reach(window=size) if kind == _WINDOW else Reach(chunk=size)
