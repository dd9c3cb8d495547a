"""One token a pass: equal to the host's own greedy search and sampling law."""

from __future__ import annotations

from hf_hybrid.core.lane import AcceptRule, Lane, Window
from hf_hybrid.decoding.writer import Writer


class Autoregressive(Writer):
    """The prompt as a trunk that grows by the last row's token."""

    def take_over(self, trunk: Lane) -> None:
        """No window, no drafts."""
        trunk.rule, trunk.window = AcceptRule(), Window()

    def settled(self, lane: Lane, tokens: list[int]) -> None:
        """The answer ends with its lane."""
        self.canvas.finished = lane.done

    def stage(self) -> str:
        """Always ``text``."""
        return "text"
