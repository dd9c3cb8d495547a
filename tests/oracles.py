"""Slow oracles: the row rule as nested loops, written from its table, and one un-cached forward under it.

Nothing here knows ``hf_hybrid.core.rows.visible`` or the cache; ``pack`` only lays rows out as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_hybrid.core.rows import PADDING, Rows


class Row(NamedTuple):
    """One row: its token and what it is."""

    token: int
    position: int
    span: int = 0
    noisy: bool = False
    anchor: int = 0
    block: int = 0


FILLER = Row(token=0, position=0, span=PADDING)


def sees(q: Row, k: Row, reads: dict[int, set[int]]) -> bool:
    """The row rule, cell by cell of its table. ``reads[s]``: the other spans that span s reads, transitively closed."""
    if q.span == PADDING or k.span == PADDING:
        return False
    if k.noisy:
        return q.noisy and q.block == k.block
    if q.span != k.span:
        return k.span in reads.get(q.span, set())
    if q.noisy:
        return k.position < q.anchor
    return k.position <= q.position


def mask(rows: Sequence[Row], reads: dict[int, set[int]]) -> Tensor:
    """bool ``(rows, rows)``, True: the row sees the column. A padding row sees itself, so that no softmax is empty."""
    size = len(rows)
    table = torch.zeros((size, size), dtype=torch.bool)
    for i in range(size):
        for j in range(size):
            table[i, j] = sees(rows[i], rows[j], reads) or i == j
    return table


@torch.no_grad()
def forward(model: Any, rows: Sequence[Row], reads: dict[int, set[int]], cache: Any = None) -> Tensor:
    """Logits ``(rows, vocab)`` of one forward over all rows with an explicit mask; ``cache``: an empty one to fill."""
    seen = mask(rows, reads)[None, None]  # (1, 1, rows, rows)
    if model.config._attn_implementation == "eager":
        lowest = torch.finfo(model.dtype).min
        seen = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, lowest)
    return model(
        input_ids=torch.tensor([[r.token for r in rows]]),
        position_ids=torch.tensor([[r.position for r in rows]]),
        attention_mask=seen,
        past_key_values=cache,
        use_cache=cache is not None,
    ).logits[0]


def pack(batch: Sequence[Sequence[Row]]) -> tuple[Tensor, Rows]:
    """Tokens and rows of one pass, each ``(batch, rows)``; shorter rows are filled up on the left."""
    width = max(len(rows) for rows in batch)
    full = [[FILLER] * (width - len(rows)) + list(rows) for rows in batch]

    def column(index: int) -> Tensor:
        return torch.tensor([[row[index] for row in rows] for rows in full])

    return column(0), Rows(column(1), column(2), column(3), column(4), column(5))


def clean(tokens: Sequence[int], start: int = 0, span: int = 0) -> list[Row]:
    """Clean rows of ``span`` at consecutive positions from ``start``."""
    return [Row(token, start + i, span) for i, token in enumerate(tokens)]


def window(start: int, length: int, span: int = 0, block: int = 0, token: int = 60) -> list[Row]:
    """Noisy rows of ``span`` at consecutive positions from ``start``, which is also their anchor."""
    return [Row(token, start + i, span, True, start, block) for i in range(length)]
