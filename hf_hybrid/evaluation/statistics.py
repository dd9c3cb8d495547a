"""Medians of ratios, and bootstrap intervals over groups of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Statistic = Callable[[np.ndarray], float]


def median(values: Sequence[float] | np.ndarray) -> float | None:
    """The median; None for no values."""
    return float(np.median(values)) if len(values) else None


def paired_ratios(
    baseline: Sequence[float],
    candidate: Sequence[float],
    groups: Sequence[str],
    counted: Sequence[bool] | None = None,
) -> dict[str, list[float]]:
    """``baseline / candidate`` of every prompt, by group.

    Args:
        baseline, candidate: seconds of the same prompts, in the same order.
        groups: the group of every prompt. counted: True: the prompt takes part (default: all do).
    """
    ratios: dict[str, list[float]] = {}
    keep = [True] * len(groups) if counted is None else counted
    for slow, fast, group, kept in zip(baseline, candidate, groups, keep, strict=True):
        if kept:
            ratios.setdefault(group, []).append(slow / fast)
    return ratios


def bootstrap_interval(
    groups: Mapping[str, Sequence[float]],
    statistic: Statistic,
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile interval of ``statistic`` when whole groups are drawn with replacement.

    Prompts about one country share its words, so they are not independent draws; the countries are. Source: Efron and
    Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3; Cameron, Gelbach and Miller, "Bootstrap-Based
    Improvements for Inference with Clustered Errors", 2008, section III.

    Args:
        groups: group -> its values; a group without values is left out.
        statistic: of all values of a draw. samples: draws. seed: of the draws. level: coverage.

    Returns:
        lower and upper end, None with fewer than two groups: then nothing is known about their spread.
    """
    values = [np.asarray(groups[name], dtype=float) for name in sorted(groups) if len(groups[name])]
    if len(values) < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, len(values), (samples, len(values)))  # (samples, groups)
    drawn = [statistic(np.concatenate([values[i] for i in draw])) for draw in draws]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
