"""Denoise: what the noisy rows of a pass propose, and which proposals settle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_hybrid.config import DiffusionSettings, Settings, WindowSettings
from hf_hybrid.core.acceptance import keyed_noise
from hf_hybrid.core.schedules import unmask_counts
from hf_hybrid.core.selection import scores, settle
from hf_hybrid.decoding.passes import LaneRows, Pass


@dataclass(frozen=True)
class Window:
    """What one window proposes: a token, its score and whether it settles, for every open position."""

    tokens: list[int]
    score: list[float]
    settled: list[bool]

    def draft(self, first: int, settings: Settings, guesses: frozenset[int]) -> list[int]:
        """The proposals behind ``first``, as long as they are sure.

        ``first`` is the token that the clean rows put at the window's first position; if the window expected another
        one, its other proposals belong to another text, unless both are ``guesses``.
        """
        if not self.tokens or not (self.tokens[0] == first or {self.tokens[0], first} <= guesses):
            return []
        return self.sure(1, settings, guesses)

    def sure(self, begin: int, settings: Settings, guesses: frozenset[int]) -> list[int]:
        """The proposals from ``begin`` on, as long as each reaches the draft threshold or is one of ``guesses``."""
        threshold = float(getattr(settings, "draft_threshold", 0.0))
        unsure = (i for i, s in enumerate(self.score) if i >= begin and s < threshold and self.tokens[i] not in guesses)
        return self.tokens[begin : next(unsure, len(self.tokens))]


@dataclass(frozen=True)
class Proposal:
    """The windows of a pass, batched: ``score`` float, ``settled`` bool (True: settles now), ``(lanes, window)``."""

    score: Tensor
    settled: Tensor


def propose(flat: Tensor, chosen: Tensor, batch: Pass, lanes: Sequence[LaneRows], settings: WindowSettings) -> Proposal:
    """Score the open positions of all lanes and pick those that settle.

    Args:
        flat: logits ``(active * keep, vocab)``. chosen: int64 ``(active * keep,)``, the token of every row.
        lanes: those with open positions.
    """
    width = max(len(rows.opens) for rows in lanes)
    places = [[batch.flat(rows.line, c) for c in rows.opens] + [0] * (width - len(rows.opens)) for rows in lanes]
    index = torch.tensor(places, device=flat.device)  # (lanes, window)
    if all(rows.lane.verified for rows in lanes):  # drafts are checked, not settled: their probability is all they need
        score, _ = scores(flat[index], "confidence", chosen[index])  # (lanes, window)
        return Proposal(score, torch.zeros_like(score, dtype=torch.bool))
    assert isinstance(settings, DiffusionSettings)
    still_open = torch.tensor([_open(rows, width) for rows in lanes], device=flat.device)  # True: open
    uniform = _uniform(lanes, width, flat.device) if settings.selection == "random" else None
    score, _ = scores(flat[index], settings.selection, chosen[index], uniform)  # (lanes, window)
    count = None
    if settings.max_denoising_steps is not None:
        count = torch.tensor([_count(rows, settings) for rows in lanes], device=flat.device)
    # A random order says nothing about how sure a position is: only the schedule settles there.
    threshold = 2.0 if settings.selection == "random" else settings.confidence_threshold
    prefix = settings.commit == "prefix" and all(rows.lane.kind != "canvas" for rows in lanes)
    return Proposal(score, settle(score, still_open, threshold, count, prefix))


def _open(rows: LaneRows, width: int) -> list[bool]:
    fills = rows.lane.fills
    size = len(rows.opens)
    return [i < size and (i >= len(fills) or fills[i] is None) for i in range(width)]


def _count(rows: LaneRows, settings: DiffusionSettings) -> int:
    """Positions that the schedule settles in this pass: a block takes at most ``max_denoising_steps`` passes."""
    steps = settings.max_denoising_steps
    assert steps is not None
    fills = rows.lane.fills
    size = len(rows.opens)
    filled = sum(token is not None for token in fills)
    if settings.commit == "prefix" and rows.lane.kind != "canvas":
        return -(-size // steps)
    goal = unmask_counts(torch.tensor([size]), min(steps, size)).cumsum(dim=-1)[0].tolist()
    # The first step of the schedule that asks for more than stands.
    return next((g - filled for g in goal if g > filled), size - filled)


def _uniform(lanes: Sequence[LaneRows], width: int, device: torch.device) -> Tensor:
    """Numbers in (0, 1), ``(lanes, window)``, keyed by seed, span and position: the batch cannot change it."""
    rows = []
    for lane_rows in lanes:
        lane = lane_rows.lane
        keys = [(lane.span << 32) + lane.anchor + i for i in range(width)]
        rows.append(keyed_noise(lane_rows.canvas.seed ^ 0x5EED, keys, 1, device)[:, 0])
    return torch.exp(-torch.exp(-torch.stack(rows)))
