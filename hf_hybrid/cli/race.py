"""The race: the same prompt is written token by token without drawing, then shown on the clock of the other answer."""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_hybrid.core.canvas import Canvas

RIVAL = "autoregressive"
WARM_UP = 2  # tokens of a call before, which takes the costs of a first call


@dataclass
class Race:
    """A streamer that records when tokens were confirmed, and can tell how far the answer was at any time.

    Attributes:
        ends: seconds since ``start`` at which each pass ended. counts: tokens confirmed by then. tokens: of the answer.
        report: of the call.
    """

    ends: list[float] = field(default_factory=list[float])
    counts: list[int] = field(default_factory=list[int])
    tokens: list[int] = field(default_factory=list[int])
    started: float = 0.0
    report: Any = None

    def put(self, value: Any) -> None:
        """Confirmed tokens; the canvas has them."""

    def end(self) -> None:
        """Nothing follows."""

    def put_canvas(self, canvas: Canvas, mask: int) -> None:
        """Record a pass."""
        self.tokens = canvas.confirmed()
        self.ends.append(time.perf_counter() - self.started)
        self.counts.append(len(self.tokens))

    @property
    def seconds(self) -> float:
        """Seconds of the whole answer."""
        return self.ends[-1] if self.ends else 0.0

    def at(self, seconds: float) -> tuple[int, list[int]]:
        """Number of passes and confirmed tokens ``seconds`` after the start."""
        passes = bisect_right(self.ends, seconds)
        return passes, self.tokens[: self.counts[passes - 1]] if passes else []


def run_race(network: Any, inputs: dict[str, Any], strategy: str, call: dict[str, Any]) -> Race:
    """Write the answer token by token, and let ``strategy`` write a few tokens before, so that both are warm.

    Args:
        inputs: ``input_ids`` and ``attention_mask``, each ``(1, prompt)``. call: other arguments of ``generate()``,
            settings of the strategy left out.
    """
    for name in (strategy, RIVAL):
        network.generate(**inputs, **{**call, "max_new_tokens": WARM_UP}, strategy=name)
    race = Race(started=time.perf_counter())
    output = network.generate(**inputs, **call, strategy=RIVAL, streamer=race, return_dict_in_generate=True)
    race.report = output.report[0]
    return race
