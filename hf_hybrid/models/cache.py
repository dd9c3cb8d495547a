"""RowCache: a transformers cache in which every pass names the slots that it writes.

The host's dynamic layer concatenates on every pass and can only forget the same number of tokens in the whole batch;
its static layer writes the same slots for all rows. Here storage ``(batch, heads, capacity, head_dim)`` is allocated
once, grows by doubling, and each sequence has its own slots, so that rows may keep different numbers of tokens, and
what is not kept is simply overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class CacheError(ValueError):
    """An operation that a RowCache does not have; the message says what to do instead."""


@dataclass
class Place:
    """Where the present pass writes and how far attention looks: one object, shared by all layers.

    Attributes:
        batch_size: sequences of the storage. capacity: slots of the storage, per sequence.
        lines: the sequences that take part in the pass, a slice.
        used: attention sees the slots before this one.
        past: slots in use before the pass, what the host takes for the length.
        interval: ``(start, stop)``, the pass writes these slots in every sequence; None: ``slots`` says which.
        slots: int64 ``(active, rows)``, slot of every row of the pass; None: ``interval`` says which.
        batch: int64 ``(active, 1)``, partner of ``slots`` in indexing.
        number: counts the passes.
    """

    batch_size: int
    capacity: int
    lines: slice
    used: int = 0
    past: int = 0
    interval: tuple[int, int] | None = None
    slots: Tensor | None = None
    batch: Tensor | None = None
    number: int = 0

    def write(self, storage: Tensor, states: Tensor) -> Tensor:
        """Write ``states`` ``(active, heads, rows, dim)`` into ``storage`` ``(batch, heads, capacity, dim)``.

        Returns:
            what attention sees, a view ``(active, heads, used, dim)``.
        """
        if self.interval is not None:
            storage[self.lines, :, self.interval[0] : self.interval[1]].copy_(states)
        elif self.slots is not None:
            slots, batch = self.slots, self.batch
            assert batch is not None
            if slots.device != states.device:  # a model spread over several devices
                slots, batch = slots.to(states.device), batch.to(states.device)
            storage[batch, :, slots] = states.transpose(1, 2)
        else:
            raise CacheError("no slots were named for this pass; call RowCache.place() before the model's forward")
        return storage[self.lines, :, : self.used]


class RowCacheLayer(CacheLayerMixin):
    """Keys and values of one attention layer; see ``RowCache``."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.written = 0  # number of the last pass that wrote here

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate. Zeros, not empty memory: attention multiplies masked values by zero, and zero times NaN is NaN."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of this pass, each ``(active, heads, rows, head_dim)``, to its slots.

        Returns:
            keys and values that attention sees, views ``(active, heads, used, head_dim)`` of the storage.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.keys.shape[2] < self.place.capacity:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)
        self.written = self.place.number
        return self.place.write(self.keys, key_states), self.place.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """``(length, offset)`` of the keys that attention sees in this pass: all used slots, from the first."""
        return self.place.used, 0

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Used slots. As in the host's own layers the rows of a pass count once they are written: that places
        the queries in a causal mask that the host builds itself."""
        return self.place.used if self.written == self.place.number else self.place.past

    def get_max_length(self) -> int:
        """-1: no bound."""
        return -1

    def swap(self, i: int, j: int, length: int) -> None:
        """Exchange the first ``length`` slots of sequences i and j."""
        for storage in (self.keys, self.values):
            if storage is not None:
                kept = storage[i, :, :length].clone()  # (heads, length, head_dim)
                storage[i, :, :length] = storage[j, :, :length]
                storage[j, :, :length] = kept

    def gathered(
        self, rows: Tensor, slots: Tensor, lines: Tensor, columns: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``(lines, heads, columns, head_dim)`` of ``size`` (lines, columns): what lies at ``(rows,
        slots)`` goes to ``(lines, columns)``, all int64 ``(count,)``; the rest is zero."""
        found: list[Tensor] = []
        for storage in (self.keys, self.values):
            assert storage is not None
            at = [index.to(storage.device) for index in (rows, slots, lines, columns)]
            gathered = storage.new_zeros((size[0], storage.shape[1], size[1], storage.shape[3]))
            gathered[at[2], :, at[3]] = storage[at[0], :, at[1]]
            found.append(gathered)
        return found[0], found[1]

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported."""
        _refuse("crop")

    def reset(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported."""
        _refuse("reset")

    def reorder_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported."""
        _refuse("reorder_cache")

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported."""
        _refuse("batch_repeat_interleave")

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported."""
        _refuse("batch_select_indices")

    def _allocate(self, states: Tensor) -> Tensor:
        _, heads, _, dim = states.shape
        return states.new_zeros((self.place.batch_size, heads, self.place.capacity, dim))

    def _grown(self, storage: Tensor) -> Tensor:
        grown = self._allocate(storage)
        grown[:, :, : storage.shape[2]] = storage
        return grown


class RowCache(Cache):
    """A cache of ``RowCacheLayer``; its owner calls ``place`` before every pass.

    Args:
        num_layers: attention layers of the model. batch_size: sequences. capacity: slots per sequence to begin with.
    """

    layers: list[RowCacheLayer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, num_layers: int, batch_size: int, capacity: int = 256) -> None:
        self.here = Place(batch_size=batch_size, capacity=max(1, capacity), lines=slice(0, batch_size))
        super().__init__(layers=[RowCacheLayer(self.here) for _ in range(num_layers)])

    @property
    def capacity(self) -> int:
        """Slots per sequence, allocated or about to be."""
        return self.here.capacity

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` slots per sequence: twice the capacity, or more when that is not enough."""
        if slots > self.here.capacity:
            self.here.capacity = max(slots, 2 * self.here.capacity)

    def place(
        self, slots: Tensor | tuple[int, int], used: int, past: int | None = None, lines: slice | None = None
    ) -> None:
        """Name the slots of the coming pass, once for all layers.

        Args:
            slots: int64 ``(active, rows)``, all different within a sequence; or ``(start, stop)``, the same for all.
            used: attention sees the slots before this one; greater than every slot of the pass.
            past: slots in use before the pass; matters only when the host builds its own mask. None: all that the pass
                does not write.
            lines: the sequences of the pass, ``slots`` are theirs. None: all.
        """
        here = self.here
        here.lines = slice(0, here.batch_size) if lines is None else lines
        self.reserve(used)
        here.number += 1
        here.used = used
        if isinstance(slots, tuple):
            here.interval, here.slots, here.batch = slots, None, None
            rows = slots[1] - slots[0]
        else:
            here.interval, here.slots = None, slots
            batch = torch.arange(here.lines.start, here.lines.start + slots.shape[0], device=slots.device)
            here.batch = batch.unsqueeze(1)  # (active, 1)
            rows = slots.shape[1]
        here.past = used - rows if past is None else past

    def swap(self, i: int, j: int, length: int) -> None:
        """Exchange the first ``length`` slots of sequences i and j (a finished row leaves, the last active one takes
        its place)."""
        if i != j:
            for layer in self.layers:
                layer.swap(i, j, min(length, layer.keys.shape[2] if layer.keys is not None else 0))


def _refuse(name: str) -> NoReturn:
    raise CacheError(
        f"RowCache has no {name}(): its rows hold different slots. Keep or drop rows with Runner.commit() and "
        "Runner.leave(), or make a new Runner; for other uses take a transformers DynamicCache"
    )
