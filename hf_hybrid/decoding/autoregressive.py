"""One token a pass: equal to the host's own greedy search and sampling law."""

from __future__ import annotations

from hf_hybrid.core.canvas import Canvas, Lane
from hf_hybrid.decoding.strategy import Strategy


class Autoregressive(Strategy):
    """The prompt as a trunk that grows by the last row's token."""

    def begin(self, canvas: Canvas, line: int) -> None:
        """One lane: the prompt."""
        trunk = Lane("trunk", canvas.new_span(), 0, list(canvas.prompt), limit=len(canvas.prompt) + canvas.budget)
        canvas.lanes.append(trunk)

    def settled(self, canvas: Canvas, lane: Lane, tokens: list[int], line: int) -> None:
        """The answer ends with its lane."""
        canvas.finished = lane.done

    def stage(self, canvas: Canvas) -> str:
        """Always ``text``."""
        return "text"
