"""Rows and the row rule: who may see whom, in training and in decoding alike.

A *row* is one token of a forward pass. It has a ``position`` (its RoPE index), a ``span`` (whose text it belongs to),
and is ``clean`` or ``noisy``. A noisy row also has an ``anchor`` (everything of its own span before this position is
known) and a ``block`` (the rows that are denoised together). ``depends[s, t]``: span ``s`` may read span ``t``.

    q      k      same span                   another span
    clean  clean  position_k <= position_q    depends[span_q, span_k]
    noisy  clean  position_k <  anchor_q      depends[span_q, span_k]
    noisy  noisy  block_q == block_k          block_q == block_k
    clean  noisy  never                       never

Autoregression, a prompt of three tokens (``x``:        Block diffusion, two noisy rows m behind "ab":
the row sees the column):

        a b c                                               a b m m
      a x . .                                             a x . . .
      b x x .                                             b x x . .
      c x x x                                             m x x x x
                                                          m x x x x

Two independent spans (A, B) behind a trunk (t), each with one clean row and a window of one noisy row (m, n):

        t A B m n
      t x . . . .
      A x x . . .
      B x . x . .
      m x x . x .
      n x . x . x

Across spans positions are not compared: ``depends`` is true only where the earlier span was finished before the later
one began, so all of it is visible, however long it grew. Rows of different documents are spans that do not depend on
each other. The rule joins the two-copy training mask of block diffusion (Arriola et al., "Block Diffusion", 2025,
section 3 and appendix B) with the visibility of planned spans (Israel et al., "Planned Diffusion", 2025, section 3);
clean rows are token-causal here and never block-causal, so that the same weights also write autoregressively.

A layer may look less far than the rule allows: with a sliding window a row sees keys less than ``window`` positions
before its own, with chunks those of its own chunk (``Reach``). Both compare positions, never slots or columns, and
noisy rows have positions too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

PADDING = -1
"""Span of a row of padding: it sees nothing and nobody sees it."""


@dataclass(frozen=True)
class Rows:
    """The rows of one pass or of one training batch; every field is ``(batch, rows)``.

    Attributes:
        position: int64, RoPE index of the token, >= 0.
        span: int64, index into ``depends``; ``PADDING`` for a row of padding.
        noisy: bool, True for a row that is denoised, False for a clean one.
        anchor: int64, for noisy rows the first position of their own span that they may not see; unused for clean rows.
        block: int64, for noisy rows the group that is denoised together (unique in its sequence); unused for clean
            rows.
    """

    position: Tensor
    span: Tensor
    noisy: Tensor
    anchor: Tensor
    block: Tensor

    @classmethod
    def clean(cls, position: Tensor, span: Tensor) -> Rows:
        """Clean rows at ``position`` ``(batch, rows)`` of ``span`` ``(batch, rows)``."""
        zeros = torch.zeros_like(position)
        return cls(position, span, torch.zeros_like(position, dtype=torch.bool), zeros, zeros)

    def select(self, index: Tensor) -> Rows:
        """The rows at ``index`` ``(rows,)``, the same for every sequence."""
        return Rows(*(getattr(self, f.name)[:, index] for f in fields(self)))


@dataclass(frozen=True)
class Reach:
    """How far the layers of one kind look, inside of what the row rule allows.

    Attributes:
        window: positions that a row sees, its own and those before it. chunk: length of the chunks whose rows see one
        another. One of the two is given, > 0.
    """

    window: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        given = [size for size in (self.window, self.chunk) if size is not None]
        if len(given) != 1 or given[0] < 1:
            raise ValueError(f"window={self.window}, chunk={self.chunk}: give one of the two, greater than 0")

    def within(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool ``(..., queries, keys)``, True: the key is near enough. Nothing ahead is too far for a window.

        Args:
            queries, keys: their positions, int64 ``(..., queries)`` and ``(..., keys)``.
        """
        queries, keys = queries[..., :, None], keys[..., None, :]
        if self.window is not None:
            return torch.lt(queries - keys, self.window)
        size = self.chunk or 1
        return torch.eq(queries // size, keys // size)

    def covers(self, last: int) -> bool:
        """True: no position up to ``last`` is too far from another one."""
        return last < (self.window or self.chunk or 0)


def visible(queries: Rows, keys: Rows, depends: Tensor) -> Tensor:
    """The row rule.

    Args:
        queries: rows that look, ``(batch, queries)``.
        keys: rows that are looked at, ``(batch, keys)``.
        depends: bool ``(batch, spans, spans)``; ``[b, s, t]`` True: span s may read span t. Reflexive and transitively
            closed.

    Returns:
        bool ``(batch, queries, keys)``, True: the query sees the key.
    """
    num_spans = depends.shape[-1]
    query_span, key_span = queries.span, keys.span  # (batch, queries), (batch, keys)
    real_query, real_key = query_span != PADDING, key_span != PADDING
    # Per span, not per query: there are few spans, and copying whole lines to the queries is cheaper than looking up
    # every pair.
    line = torch.arange(num_spans, device=depends.device).unsqueeze(1)  # (spans, 1)
    own = key_span.unsqueeze(1) == line  # (batch, spans, keys)
    related = depends.gather(2, key_span.clamp(min=0).unsqueeze(1).expand(-1, num_spans, -1))
    related = related & (real_key & ~keys.noisy).unsqueeze(1)
    batch = torch.arange(depends.shape[0], device=depends.device).unsqueeze(1)
    index = query_span.clamp(min=0)
    same, other = (related & own)[batch, index], (related & ~own)[batch, index]  # (batch, queries, keys)
    # One past the last position of its own span that a row may see: itself for a clean row, strictly before the anchor
    # for a noisy one.
    limit = torch.where(queries.noisy, queries.anchor, queries.position + 1).unsqueeze(2)
    clean = other | (same & (keys.position.unsqueeze(1) < limit))
    # Clean and padding rows get block numbers that never meet.
    lowest = torch.iinfo(torch.int64).min
    query_block = queries.block.masked_fill(~queries.noisy, lowest).unsqueeze(2)
    key_block = keys.block.masked_fill(~(keys.noisy & real_key), lowest + 1).unsqueeze(1)
    return (clean | (query_block == key_block)) & real_query.unsqueeze(2)


def transitive_closure(depends: Tensor) -> Tensor:
    """Reflexive and transitive closure of ``depends`` (bool ``(..., spans, spans)``), by repeated squaring."""
    spans = depends.shape[-1]
    closed = depends | torch.eye(spans, dtype=torch.bool, device=depends.device)
    for _ in range(max(1, (spans - 1).bit_length())):
        closed = closed | (closed.float() @ closed.float() > 0)
    return closed
