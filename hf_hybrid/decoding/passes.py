"""From lanes to the rows of one pass, and which column of the logits belongs to what.

The rows of a sequence are at the right end of the pass: first clean rows whose logits nobody needs, then for every
lane its last settled token, its draft and its window. So the logits of the last ``keep`` columns are all that the pass
computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_hybrid.core.canvas import Canvas
from hf_hybrid.core.lane import Lane
from hf_hybrid.core.rows import PADDING, Rows


@dataclass(eq=False)
class LaneRows:
    """The rows of one lane in a pass.

    Attributes:
        canvas: its canvas. lane: the lane. line: of the pass, its sequence.
        checks: columns of the pass that hold the last settled token and the draft: each predicts the next token. Empty
            when the pass feeds no clean row of the lane. fed: settled tokens that the pass feeds. silent: columns of
            those in front of ``checks``.
        opens: columns of the noisy window. in_order: scores ``(vocab,)`` of the emitted tokens, where processors read
        a true prefix.
    """

    canvas: Canvas
    lane: Lane
    line: int
    fed: int
    silent: range = range(0)
    checks: range = range(0)
    opens: range = range(0)
    in_order: list[Tensor] = field(default_factory=list[Tensor])


@dataclass(eq=False)
class Pass:
    """One pass, ready for ``Runner.run``: ``tokens`` ``(active, rows)``, ``rows`` alike, the last ``keep`` columns
    scored. ``first``: sequence of the Runner that is line 0. ``rejected``: line and column of rows that leave again.
    ``moved``: line, column and span of rows of a branch that became rows of the text."""

    tokens: Tensor
    rows: Rows
    keep: int
    plain: bool
    lanes: list[LaneRows]
    width: int
    first: int
    rejected: list[tuple[int, int]] = field(default_factory=list)
    moved: list[tuple[int, int, int]] = field(default_factory=list)

    def flat(self, line: int, column: int) -> int:
        """Index of ``(line, column)`` in the logits flattened to ``(active * keep, vocab)``."""
        return line * self.keep + column - (self.width - self.keep)


def build_pass(
    canvases: Sequence[Canvas], mask_token: int, filled: Callable[[int], int] | None = None, first_row: int = 0
) -> Pass:
    """The rows of all lanes that run, and the last tokens of finished lanes, which ride along.

    Args:
        mask_token: id at open positions and in rows of padding.
        filled: rows -> rows up to which a pass of one sequence is filled (``Runner.filled``); None: those it has.
        first_row: sequence of the Runner that the first canvas is.
    """
    nothing = (mask_token, 0, PADDING, 0, 0, 0)
    silent: list[list[tuple[int, int, int]]] = []  # per sequence: (token, position, span)
    scored: list[list[tuple[int, int, int, int, int, int]]] = []  # (token, position, span, noisy, anchor, block)
    lanes: list[LaneRows] = []
    # Lane rows, first silent row and number, first scored row, checks, opens.
    offsets: list[tuple[LaneRows, int, int, int, int, int]] = []
    for line, canvas in enumerate(canvases):
        quiet: list[tuple[int, int, int]] = []
        loud: list[tuple[int, int, int, int, int, int]] = []
        for lane in canvas.pending():
            at = lane.start + lane.cached
            quiet += [(token, at + i, lane.span_at(lane.cached + i)) for i, token in enumerate(lane.pending)]
            lanes.append(LaneRows(canvas, lane, line, len(lane.tokens) - lane.cached))
        for number, lane in enumerate(canvas.running(), 1):
            at, pending, before = lane.start + lane.cached, lane.pending, len(quiet)
            quiet += [(token, at + i, lane.span_at(lane.cached + i)) for i, token in enumerate(pending[:-1])]
            rows = LaneRows(canvas, lane, line, len(pending))
            first = len(loud)
            clean = pending[-1:] + lane.drafted.tokens if pending else []
            last = len(lane.tokens) - 1
            spans = [lane.span_at(last + i) for i in range(len(clean))]
            if lane.drafted.parents:
                spans[1:] = lane.drafted.spans
            depths = lane.drafted.depths()[: len(clean)]
            loud += [
                (token, lane.start + last + depth, span, 0, 0, 0)
                for token, depth, span in zip(clean, depths, spans, strict=True)
            ]
            size, anchor, span = lane.open_length, lane.anchor, lane.span_at(last + len(lane.drafted.tokens))
            fills = lane.window.fills[:size]
            loud += [
                (mask_token if token is None else token, anchor + i, span, 1, anchor, number)
                for i, token in enumerate(fills + [None] * (size - len(fills)))
            ]
            if lane.part is not None:
                lane.part.passes += 1
            lanes.append(rows)
            offsets.append((rows, before, len(quiet) - before, first, len(clean), size))
        silent.append(quiet)
        scored.append(loud)
    sizes = [len(q) + len(s) for q, s in zip(silent, scored, strict=True)]
    one_trunk = all(len(c.lanes) == 1 and not c.lanes[0].drafted.parents for c in canvases)
    one_trunk = one_trunk and not any(size for *_, size in offsets)
    plain = one_trunk and len(set(sizes)) == 1
    if len(canvases) == 1 and not plain and filled is not None:
        # Behind the others, so that those which stay in the cache take the first slots.
        size = filled(sizes[0])
        scored[0] += [nothing] * (size - sizes[0])
        sizes[0] = size
    keep = max(len(loud) for loud in scored)
    width = max(*sizes, keep)
    fields: list[list[list[int]]] = [[] for _ in range(6)]
    for quiet, loud in zip(silent, scored, strict=True):
        padding = [nothing] * (width - len(quiet) - len(loud))
        columns = list(zip(*padding, *((*q, 0, 0, 0) for q in quiet), *loud, strict=True))
        for values, column in zip(fields, columns, strict=True):
            values.append(list(column))
    tokens, position, span, noisy, anchor, block = torch.tensor(fields).unbind(0)  # (active, width)
    for rows, before, quiet_rows, first, checks, opens in offsets:
        begin = width - len(scored[rows.line]) - len(silent[rows.line]) + before
        rows.silent = range(begin, begin + quiet_rows)
        begin = width - len(scored[rows.line]) + first
        rows.checks = range(begin, begin + checks)
        rows.opens = range(begin + checks, begin + checks + opens)
    return Pass(tokens, Rows(position, span, noisy.bool(), anchor, block), keep, plain, lanes, width, first_row)
