"""Cost model: a running fit of the seconds of a pass against its rows, from the passes that are made anyway.

One row is a case of its own: a product of one row by the weights is a cheaper kernel. From two rows on, seconds are
close to ``a + b * rows`` (docs/performance.md). A cost model belongs to a model on its device and outlives a call. It
may choose only what cannot change the text.
"""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

MOST_ROWS = 256
"""Passes of more rows say nothing about those that check drafts."""
_KEPT = 0.96  # weight of the past when a pass is added: half of it is 17 passes old
_GUESSES = {
    "flipped": ((8, 1.35), (32, 2.2)),
    "packed": ((8, 1.7), (32, 2.8)),
    "other": ((8, 1.05), (32, 1.15)),
    "states": ((8, 2.0), (32, 5.0)),
}
"""By kind of products (``FewRows.kind``): (rows, seconds in units of a pass of one row) before anything was measured;
each counts as one measured pass."""
_LEAST = {"packed": 5}
"""By kind of products: a pass of 2 rows or more takes as long as one of at least so many rows."""


class CostModel(Protocol):
    """Seconds of a pass."""

    def seconds(self, rows: int) -> float:
        """Seconds of a pass of ``rows`` rows, those of all sequences together."""
        ...

    def note(self, rows: int, seconds: float) -> None:
        """A pass of ``rows`` rows took ``seconds``."""
        ...


class MeasuredCosts:
    """CostModel from measured passes.

    Args:
        kind: of the products of few rows (``FewRows.kind``), for a first guess.
    """

    def __init__(self, kind: str = "other"):
        self._guesses = _GUESSES[kind]
        self._least = _LEAST.get(kind, 1)
        self._one, self._ones = 1.0, 0  # seconds of a pass of one row, how often it was measured
        self._sums = [0.0] * 5  # weighted: number, rows, seconds, rows squared, rows times seconds

    def seconds(self, rows: int) -> float:
        """Seconds of a pass of ``rows`` rows; before any was measured, in units of a pass of one row."""
        if rows <= 1:
            return self._one
        start, slope = self._line()
        return max(self._one, start + slope * max(rows, self._least))

    def note(self, rows: int, seconds: float) -> None:
        """One pass; an outlier counts as twice what was expected."""
        if rows > MOST_ROWS or not seconds > 0:
            return
        if rows == 1:
            seconds = min(seconds, 2 * self._one) if self._ones else seconds
            self._ones += 1
            self._one += (seconds - self._one) / min(self._ones, 16)
            return
        if self._ones or self._sums[0]:
            seconds = min(seconds, 2 * self.seconds(rows))
        if not self._ones:  # nothing but wide passes so far: the guess, read backwards
            self._one = seconds / self._ratio(rows)
        new = (1.0, rows, seconds, rows * rows, rows * seconds)
        self._sums = [_KEPT * old + more for old, more in zip(self._sums, new, strict=True)]

    def _ratio(self, rows: int) -> float:
        (low, cheap), (high, dear) = self._guesses
        return cheap + (dear - cheap) * (max(rows, low) - low) / (high - low)

    def _line(self) -> tuple[float, float]:
        """Start and slope by least squares, the guesses included."""
        n, x, y, xx, xy = self._sums
        for rows, ratio in self._guesses:
            seconds = ratio * self._one
            n, x, y, xx, xy = n + 1, x + rows, y + seconds, xx + rows * rows, xy + rows * seconds
        slope = max(0.0, (n * xy - x * y) / (n * xx - x * x))  # two guesses: never 0 / 0
        return (y - slope * x) / n, slope


class GuessedCosts:
    """CostModel before anything was measured, in units of a pass of one row: the same in every process.

    Args:
        kind: of the products of few rows (``FewRows.kind``).
    """

    def __init__(self, kind: str = "other"):
        self._guess = MeasuredCosts(kind)

    def seconds(self, rows: int) -> float:
        """Of a pass of ``rows`` rows, in units of a pass of one row."""
        return self._guess.seconds(rows)

    def note(self, rows: int, seconds: float) -> None:
        """What a pass took changes nothing."""


_known: WeakKeyDictionary[Any, dict[tuple[str, torch.dtype, int], CostModel]] = WeakKeyDictionary()


def cost_model_of(model: Any, device: torch.device, dtype: torch.dtype, kind: str = "other") -> CostModel:
    """The cost model of ``model`` as it is now: another device, dtype or number of threads has its own."""
    key = (str(device), dtype, torch.get_num_threads())
    known = _known.setdefault(model, {})
    return known.get(key) or known.setdefault(key, MeasuredCosts(kind))
