"""Slots: what a RowCache holds, and which of it the spans see.

All of it is numpy on the host, where it is decided: a pass never waits for the device, and at these sizes an operation
of numpy takes a third of the time of one of torch. Every span has a line, its mask over all slots, which grows by the
columns that a commit adds. The mask of a pass is one line per row, and the row rule over the rows of the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from hf_hybrid.core.rows import PADDING, Reach, Rows, visible
from hf_hybrid.models.layers import WHOLE, Layers

FEW = 128
"""Up to so many rows of a pass the row rule is faster in numpy."""

Where = tuple[int, int] | Tensor
"""Slots of a pass, as ``RowCache.place`` takes them: an interval for all sequences, or int64 ``(active, rows)``."""


class Slots:
    """Slots of ``batch_size`` sequences. Only clean rows are ever held: noisy ones leave with their pass.

    Args:
        capacity: slots per sequence. num_spans: spans per sequence to begin with; ``relate`` makes more.
        layers: how far the layers of the model look.
        device, dtype: of the masks. dtype bool: True where a row sees a slot; a float type: additive, zero there and
            the type's lowest number elsewhere.

    Attributes:
        position, span: int64 ``(batch, capacity)`` of the held rows; span ``PADDING``: the slot is free.
        top: int64 ``(batch,)``, one past the last held slot. count: int64 ``(batch,)``, held slots.
        depends: bool ``(batch, spans + 1, spans + 1)``. The last line and column are ``PADDING``'s: all False.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        num_spans: int,
        device: torch.device,
        dtype: torch.dtype,
        layers: Layers = WHOLE,
    ):
        self.device, self.dtype = device, dtype
        self.layers = layers
        kind = np.float64 if dtype == torch.float64 else np.float32  # which holds the numbers of smaller types
        self._zero, self._lowest = kind(0), kind(0 if dtype == torch.bool else torch.finfo(dtype).min)
        self.position = np.zeros((batch_size, capacity), dtype=np.int64)
        self.span = np.full((batch_size, capacity), PADDING, dtype=np.int64)
        self.top = np.zeros(batch_size, dtype=np.int64)
        self.count = np.zeros(batch_size, dtype=np.int64)
        self.depends = _related(batch_size, max(1, num_spans))
        self._reach = np.zeros(self.depends.shape[:2], dtype=np.int64)  # one past the last held position of a span
        self._lines: np.ndarray | None = None  # (batch, spans + 1, capacity), bool or additive
        self._drawn = 0  # columns of _lines before this one are right
        self._highest = 0  # one past the last column that was ever drawn

    @property
    def num_spans(self) -> int:
        """Spans that have a line."""
        return self.depends.shape[1] - 1

    def relate(self, row: int, span: int, sees: Sequence[int]) -> None:
        """Sequence ``row``: ``span`` reads the spans in ``sees``, itself always, and no other."""
        needed = max([span, *sees]) + 1
        if needed > self.num_spans:
            old, size = self.num_spans, max(needed, 2 * self.num_spans)
            grown = _related(len(self.depends), size)
            grown[:, :old, :old] = self.depends[:, :old, :old]
            reach = np.zeros(grown.shape[:2], dtype=np.int64)
            reach[:, :old] = self._reach[:, :old]
            self.depends, self._reach, self._lines = grown, reach, None
        reads = np.zeros(self.depends.shape[1], dtype=bool)
        reads[[span, *sees]] = True
        others = [s for s in sees if s != span]
        beyond = self.depends[row, others].any(axis=0) & ~reads
        if beyond.any():
            raise ValueError(
                f"span {span} is to read {sorted(others)}, which read {np.flatnonzero(beyond).tolist()} too; "
                "pass the transitive closure (core.rows.transitive_closure)"
            )
        self.depends[row, span] = reads
        self._drawn = 0

    def choose(self, lines: slice, num_rows: int) -> tuple[np.ndarray, Where]:
        """Free slots of the sequences ``lines``, lowest first: int64 ``(lines, num_rows)``, in both forms."""
        top = self.top[lines]
        if (self.count[lines] == top).all():  # no holes
            slots = top[:, None] + np.arange(num_rows)
            if (top == top[0]).all():
                return slots, (int(top[0]), int(top[0]) + num_rows)
        else:
            slots = np.empty((len(top), num_rows), dtype=np.int64)
            for row, span in enumerate(self.span[lines]):
                holes = np.flatnonzero(span[: top[row]] == PADDING)[:num_rows]
                slots[row, : len(holes)] = holes
                slots[row, len(holes) :] = top[row] + np.arange(num_rows - len(holes))
        return slots, torch.from_numpy(slots).to(self.device)

    def hold(self, rows: Rows, slots: np.ndarray, stays: np.ndarray, first: int = 0) -> None:
        """The rows of a pass that stay, ``stays`` bool ``(lines, rows)``, lie in ``slots`` from now on.

        Args:
            first: the sequence of the first line.
        """
        lines, columns = np.nonzero(stays)
        place, span, position = slots[lines, columns], rows.span.numpy(), rows.position.numpy()
        span, position = span[lines, columns], position[lines, columns]
        lines += first
        self.span[lines, place] = span
        self.position[lines, place] = position
        np.maximum.at(self._reach, (lines, span), position + 1)
        np.maximum.at(self.top, lines, place + 1)
        self.count[first : first + len(stays)] += stays.sum(axis=1)
        self._drawn = min(self._drawn, int(place.min(initial=self._drawn)))

    def in_order(self, rows: Rows, where: Where, lines: slice) -> bool:
        """True: of the sequences ``lines`` every slot, those of the pass too, holds the row at its own position, so
        that a mask which counts slots counts positions."""
        if not isinstance(where, tuple):
            return False
        start, stop = where
        held = (self.position[lines, :start] == np.arange(start)).all()
        right = (rows.position.numpy() == np.arange(start, stop)) | (rows.span.numpy() == PADDING)
        return bool(held) and bool(right.all())

    def mask(
        self, rows: Rows, slots: np.ndarray, where: Where, used: int, first: int = 0
    ) -> Tensor | dict[str, Tensor]:
        """The row rule for the rows of a pass, over the used slots.

        Args:
            rows: on the host, ``(active, rows)``. slots, where: their slots, as ``choose`` gave them. used: attention
                sees the slots before this one. first: the sequence of the first line.

        Returns:
            ``(active, 1, rows, used)``, additive or bool; of each kind of layers, where the model asks for that.
        """
        sees = self._seen(rows, slots, where, used, first)
        full = self._tensor(sees)
        if not self.layers.near:
            return full
        held = self.position[first : first + len(sees), :used].copy()  # (active, used)
        np.put_along_axis(held, slots, rows.position.numpy(), axis=1)
        # Positions of free slots are old ones, which no row sees.
        last, keys = int(held.max()), torch.from_numpy(held)

        def cut(reach: Reach) -> Tensor:
            if reach.covers(last):
                return full
            near = reach.within(rows.position, keys).numpy()
            return self._tensor(sees & near if self.dtype == torch.bool else np.where(near, sees, self._lowest))

        return self.layers.masks(full, cut)

    def _seen(self, rows: Rows, slots: np.ndarray, where: Where, used: int, first: int) -> np.ndarray:
        """``mask`` of layers that look at everything: ``(active, rows, used)``, as ``_rendered`` renders it."""
        active, width = rows.span.shape
        position, span, noisy, anchor, block = (getattr(rows, f.name).numpy() for f in fields(rows))
        lines = slice(first, first + active)
        batch = np.arange(first, first + active)[:, None]  # (active, 1)
        limit = np.where(noisy, anchor, position + 1)  # (active, rows)
        among = visible(rows, rows, torch.from_numpy(self.depends[lines])).numpy() if width > FEW else None
        if among is None:
            # core.rows.visible, written for few rows.
            asks, asked = span[:, :, None], span[:, None, :]
            among = self.depends[batch[:, :, None], asks, asked]
            among &= (asks != asked) | (position[:, None, :] < limit[:, :, None])
            if noisy.any():
                among &= ~noisy[:, None, :]
                together = (block[:, :, None] == block[:, None, :]) & noisy[:, :, None] & noisy[:, None, :]
                among |= together & (asks != PADDING) & (asked != PADDING)
        # Every row sees itself; a padding row nothing else, but a softmax over no key at all would be NaN.
        among[:, range(width), range(width)] = True
        if (limit >= self._reach[batch, span]).all():
            # Every row is behind all that is held of its own span: positions need not be compared.
            sees = self._draw()[:, :, :used][batch, span]  # (active, rows, used)
        else:
            held = Rows.clean(*(torch.from_numpy(a[lines, :used]) for a in (self.position, self.span)))
            sees = self._rendered(visible(rows, held, torch.from_numpy(self.depends[lines])).numpy())
        if isinstance(where, tuple):
            sees[:, :, where[0] : where[1]] = self._rendered(among)
        else:
            np.put_along_axis(sees, slots[:, None, :], self._rendered(among), axis=2)
        return sees

    def swap(self, i: int, j: int) -> None:
        """Exchange what sequences i and j hold, their spans too."""
        for array in (self.position, self.span, self.top, self.count, self.depends, self._reach):
            array[[i, j]] = array[[j, i]]
        self._drawn = 0

    def clear(self, row: int) -> None:
        """Sequence ``row`` holds nothing, and its spans read nothing but themselves."""
        self.span[row] = PADDING
        self.top[row] = self.count[row] = self._reach[row] = 0
        self.depends[row] = _related(1, self.num_spans)[0]
        self._drawn = 0

    def forget(self, row: int, position: int) -> None:
        """Sequence ``row`` holds nothing at ``position`` or behind it."""
        top = int(self.top[row])
        gone = np.flatnonzero((self.span[row, :top] != PADDING) & (self.position[row, :top] >= position))
        if not gone.size:
            return
        self.span[row, gone] = PADDING
        self.count[row] -= gone.size
        self.top[row] = int(np.flatnonzero(self.span[row, :top] != PADDING).max(initial=-1)) + 1
        np.minimum(self._reach[row], position, out=self._reach[row])
        self._drawn = min(self._drawn, int(gone[0]))

    def grow(self, capacity: int) -> None:
        """Follow the capacity of the cache."""
        more = capacity - self.span.shape[1]
        if more > 0:
            self.position = np.pad(self.position, ((0, 0), (0, more)))
            self.span = np.pad(self.span, ((0, 0), (0, more)), constant_values=PADDING)
            self._lines = None

    def _draw(self) -> np.ndarray:
        """``lines``, with the columns that changed since the last call."""
        size = (*self.depends.shape[:2], self.span.shape[1])
        if self._lines is None:
            self._lines = self._rendered(np.zeros(size, dtype=bool))
            self._drawn = 0
        top = self._highest = max(self._highest, int(self.top.max()))  # columns of a cleared row are drawn again too
        if self._drawn < top:
            columns = self.span[:, None, self._drawn : top]  # (batch, 1, columns), PADDING is the last line
            index = np.broadcast_to(columns, (*size[:2], columns.shape[2]))
            changed = np.take_along_axis(self.depends, index, axis=2)
            self._lines[:, :, self._drawn : top] = self._rendered(changed)
            self._drawn = top
        return self._lines

    def _tensor(self, sees: np.ndarray) -> Tensor:
        """``(active, rows, used)`` as a mask ``(active, 1, rows, used)``."""
        return torch.from_numpy(sees).to(self.device, self.dtype).unsqueeze(1)

    def _rendered(self, sees: np.ndarray) -> np.ndarray:
        """A bool mask as attention takes it."""
        return sees if self.dtype == torch.bool else np.where(sees, self._zero, self._lowest)


def _related(batch_size: int, num_spans: int) -> np.ndarray:
    """bool ``(batch, spans + 1, spans + 1)``: every span reads itself; ``PADDING``, the last one, nothing."""
    related = np.tile(np.eye(num_spans + 1, dtype=bool), (batch_size, 1, 1))
    related[:, -1, -1] = False
    return related
