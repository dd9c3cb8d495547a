"""Denoise: what the noisy rows of a pass propose, and which proposals settle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_hybrid.core.acceptance import keyed_noise
from hf_hybrid.core.lane import AcceptRule, Lane
from hf_hybrid.core.schedules import unmask_counts
from hf_hybrid.core.selection import scores, settle
from hf_hybrid.decoding.passes import LaneRows, Pass


@dataclass(frozen=True)
class Proposal:
    """What one window proposes: a token, its score and whether it settles, for every open position."""

    tokens: list[int]
    score: list[float]
    settled: list[bool]

    def draft(self, first: int, threshold: float, guesses: frozenset[int]) -> list[int]:
        """The proposals behind ``first``, as long as they are sure.

        ``first`` is the token that the clean rows put at the window's first position; if the window expected another
        one, its other proposals belong to another text, unless both are ``guesses``.
        """
        if not self.tokens or not (self.tokens[0] == first or {self.tokens[0], first} <= guesses):
            return []
        return self.sure(1, threshold, guesses)

    def sure(self, begin: int, threshold: float, guesses: frozenset[int]) -> list[int]:
        """The proposals from ``begin`` on, as long as each reaches the draft threshold or is one of ``guesses``."""
        unsure = (i for i, s in enumerate(self.score) if i >= begin and s < threshold and self.tokens[i] not in guesses)
        return self.tokens[begin : next(unsure, len(self.tokens))]


@dataclass(frozen=True)
class Proposals:
    """The windows of ``lanes``, which have one rule: ``score`` float, ``settled`` bool (True: settles now),
    ``(lanes, window)``."""

    lanes: list[LaneRows]
    score: Tensor
    settled: Tensor


def propose_all(flat: Tensor, chosen: Tensor, batch: Pass) -> list[Proposals]:
    """Score the open positions of all lanes and pick those that settle; lanes of one rule together.

    Args:
        flat: logits ``(active * keep, vocab)``. chosen: int64 ``(active * keep,)``, the token of every row.
    """
    groups: dict[AcceptRule, list[LaneRows]] = {}
    for rows in batch.lanes:
        if rows.opens:
            groups.setdefault(rows.lane.rule, []).append(rows)
    return [_propose(flat, chosen, batch, lanes, rule) for rule, lanes in groups.items()]


def _propose(flat: Tensor, chosen: Tensor, batch: Pass, lanes: list[LaneRows], rule: AcceptRule) -> Proposals:
    width = max(len(rows.opens) for rows in lanes)
    places = [[batch.flat(rows.line, c) for c in rows.opens] + [0] * (width - len(rows.opens)) for rows in lanes]
    index = torch.tensor(places, device=flat.device)  # (lanes, window)
    if rule.checked:  # drafts are checked, not settled: their probability is all they need
        score, _ = scores(flat[index], "confidence", chosen[index])  # (lanes, window)
        return Proposals(lanes, score, torch.zeros_like(score, dtype=torch.bool))
    still_open = torch.tensor([_open(rows, width) for rows in lanes], device=flat.device)  # True: open
    uniform = _uniform(lanes, width, flat.device) if rule.selection == "random" else None
    score, _ = scores(flat[index], rule.selection, chosen[index], uniform)  # (lanes, window)
    count = None
    if rule.steps is not None:
        count = torch.tensor([_count(rows, rule, rule.steps) for rows in lanes], device=flat.device)
    # A random order says nothing about how sure a position is: only the schedule settles there.
    threshold = 2.0 if rule.selection == "random" else rule.threshold
    prefix = rule.commit == "prefix"
    return Proposals(lanes, score, settle(score, still_open, threshold, count, prefix=prefix))


def fill(
    lane: Lane,
    new: list[int],
    proposal: Proposal,
    close: Callable[[Lane, list[int | None]], list[int | None]],
) -> list[int]:
    """Tokens that an unchecked window settles; the others stay in it.

    Args:
        new: the token that a clean row wrote at the window's first position; empty: the pass had no such row.
        close: fills what is behind an end.
    """
    if lane.rule.commit == "prefix":
        # Behind a first token that the window did not expect, its other proposals belong to another text.
        if new and proposal.tokens[0] != new[0]:
            return new
        unsure = (i for i, settled in enumerate(proposal.settled) if not settled and i > 0)
        return new + proposal.tokens[len(new) : next(unsure, len(proposal.tokens))]
    fills = lane.window.fills or [None] * len(proposal.tokens)
    for place, (token, settled) in enumerate(zip(proposal.tokens, proposal.settled, strict=True)):
        if fills[place] is None and settled:
            fills[place] = token
    fills[: len(new)] = new
    lane.window.fills = close(lane, fills)
    if any(token is None for token in lane.window.fills):
        return []
    done = [token for token in lane.window.fills if token is not None]
    lane.window.fills = []
    return done


def note_confidence(lane: Lane, proposal: Proposal) -> bool:
    """True: from now on the lane goes on token by token, because its window was not sure of anything for two passes in
    a row (``AcceptRule.fallback``)."""
    limit, window = lane.rule.fallback, lane.window
    if limit is None or not proposal.score or window.fallback:
        return False
    window.low = window.low + 1 if max(proposal.score) < limit else 0
    if window.low < 2 or any(token is not None for token in window.fills):
        return False
    # A block whose clean rows are all in the cache has nothing to feed but an open position: blocks of one.
    window.length = 1 if not lane.rule.checked and lane.rule.commit == "block" else 0
    window.fills = []
    window.fallback = f"token by token: no open position above {limit} for two passes"
    return True


def _open(rows: LaneRows, width: int) -> list[bool]:
    fills = rows.lane.window.fills
    size = len(rows.opens)
    return [i < size and (i >= len(fills) or fills[i] is None) for i in range(width)]


def _count(rows: LaneRows, rule: AcceptRule, steps: int) -> int:
    """Positions that the schedule settles in this pass: a window takes at most ``steps`` passes."""
    size = len(rows.opens)
    if rule.commit == "prefix":
        return -(-size // steps)
    filled = sum(token is not None for token in rows.lane.window.fills)
    goal = unmask_counts(torch.tensor([size]), min(steps, size)).cumsum(dim=-1)[0].tolist()
    # The first step of the schedule that asks for more than is filled.
    return next((g - filled for g in goal if g > filled), size - filled)


def _uniform(lanes: Sequence[LaneRows], width: int, device: torch.device) -> Tensor:
    """Numbers in (0, 1), ``(lanes, window)``, keyed by seed, span and position: the batch cannot change it."""
    rows = []
    for lane_rows in lanes:
        lane = lane_rows.lane
        keys = [(lane.span << 32) + lane.anchor + i for i in range(width)]
        rows.append(keyed_noise(lane_rows.canvas.seed ^ 0x5EED, keys, 1, device)[:, 0])
    return torch.exp(-torch.exp(-torch.stack(rows)))
