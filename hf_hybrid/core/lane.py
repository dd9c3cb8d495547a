"""Lane: a stretch of text that grows on its own, the trunk (prompt, texts and plans) or a part of a plan.

Lanes are kept as Python lists, not tensors: a pass changes a handful of tokens in each of a handful of lanes, and the
host needs every token anyway; the tensor work of a pass (masks, scores, selection) is batched over all lanes elsewhere.

    settled tokens           drafted               noisy window
    [t t t t t t t | t t]    [d d d]               [m m m m]
     in the cache    pending

A pass carries the pending and the drafted tokens as clean rows, and the window as noisy rows behind them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hf_hybrid.core.selection import Score

Kind = Literal["trunk", "span", "canvas"]
Commit = Literal["prefix", "block"]
UNBOUNDED = 1 << 40


@dataclass(frozen=True)
class AcceptRule:
    """How a lane settles what its window proposes.

    Attributes:
        checked: True: proposals are drafted, and accepted as far as the clean rows of the next pass write the same;
            False: they settle by their score.
        draft_threshold: a draft ends before the first proposal whose probability is below this (``checked``).
        threshold: a position settles when its score reaches this. selection: the score. steps: a window settles in at
            most so many passes, None: by its scores alone.
        commit: ``prefix``: what is settled from the left becomes text at once; ``block``: when the window is full.
        fallback: a lane whose best score stays below this for two passes goes on token by token; None: never.
    """

    checked: bool = True
    draft_threshold: float = 0.0
    threshold: float = 1.0
    selection: Score = "confidence"
    steps: int | None = None
    commit: Commit = "prefix"
    fallback: float | None = None


@dataclass(frozen=True)
class Bounds:
    """``limit``: most tokens that a lane may hold. ``positions``: the first position that the model does not have."""

    limit: int = UNBOUNDED
    positions: int = UNBOUNDED


@dataclass(eq=False)
class Drafted:
    """What is drafted behind the settled tokens of a lane, until the next pass has checked it.

    Attributes:
        tokens: ids. parents: of a tree, for each the index of the one that it follows, -1: the settled text; empty: a
        chain. spans: of a tree, whose text each is until it is accepted. ending: True: the lane is expected to end
        right behind them, so there is no window.
    """

    tokens: list[int] = field(default_factory=list[int])
    parents: tuple[int, ...] = ()
    spans: tuple[int, ...] = ()
    ending: bool = False

    def depths(self) -> list[int]:
        """How far behind the last settled token that token itself (0) and each drafted one are."""
        if not self.parents:
            return list(range(1 + len(self.tokens)))
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent + 1] + 1)
        return depths


@dataclass(eq=False)
class Window:
    """The noisy window of a lane.

    Attributes:
        length: open positions to carry behind settled and drafted tokens; 0: token by token.
        fills: what it holds so far, None: open; empty: all open. low: passes in a row without a confident position.
        fallback: why the lane goes on token by token; empty: it does not.
    """

    length: int = 0
    fills: list[int | None] = field(default_factory=list[int | None])
    low: int = 0
    fallback: str = ""


@dataclass(eq=False)
class PlannedPart:
    """Which part of a round a lane writes.

    Attributes:
        number: its index in the round. opening: how many of its first tokens are given, not written. planned: planned
        length of its text in tokens. depends: lanes that must be finished before it begins. passes: it took part in.
    """

    number: int = 0
    opening: int = 0
    planned: int = 0
    depends: tuple[Lane, ...] = ()
    passes: int = 0


@dataclass(eq=False)
class Entries:
    """Spans of a trunk segment: entries of a plan are read apart from what is before them.

    Attributes:
        sees: spans that the segment reads besides its own. begins: rising indices into settled and drafted tokens at
        which the next of ``spans`` begins.
    """

    sees: tuple[int, ...] = ()
    begins: list[int] = field(default_factory=list[int])
    spans: list[int] = field(default_factory=list[int])


@dataclass(eq=False)
class Lane:
    """One growing stretch of text.

    Attributes:
        kind: ``trunk``; ``span``: a part; ``canvas``: a dense round (noisy until every part is full).
        span: its id in the row rule. start: position of ``tokens[0]``.
        tokens: settled tokens, openings included. cached: how many of them have keys in the cache.
        rule: how it settles. bounds: how long it may become. drafted, window: what the next pass carries behind the
        settled tokens.
        part: which part it writes, None: of the trunk. entries: spans of a trunk segment.
        assumed: lanes that are expected to end with these tokens in the next pass, of which this lane already reads
            the drafts; empty: it does not run ahead.
        hidden: half-open ranges of ``tokens`` that are no text (control tokens and plan).
        reason: why no token will be added: ``end`` (its terminator), ``limit``, ``length`` (the answer is cut in it),
            ``stop`` or ``given``; empty: it is running.
    """

    kind: Kind
    span: int
    start: int
    tokens: list[int]
    rule: AcceptRule = AcceptRule()
    bounds: Bounds = Bounds()
    cached: int = 0
    drafted: Drafted = field(default_factory=Drafted)
    window: Window = field(default_factory=Window)
    part: PlannedPart | None = None
    entries: Entries = field(default_factory=Entries)
    assumed: list[tuple[Lane, list[int]]] = field(default_factory=list["tuple[Lane, list[int]]"])
    hidden: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    reason: str = ""

    @property
    def done(self) -> bool:
        """True: no token will be added."""
        return bool(self.reason)

    @property
    def opening(self) -> int:
        """How many of its first tokens are given, not written."""
        return self.part.opening if self.part is not None else 0

    @property
    def planned(self) -> int:
        """Planned length of its text, 0 for the trunk."""
        return self.part.planned if self.part is not None else 0

    @property
    def open_length(self) -> int:
        """Positions of the noisy window in the next pass: one more than the room left, for the terminator."""
        if self.done or self.drafted.ending:
            return 0
        room = self.bounds.limit - len(self.tokens) - len(self.drafted.tokens) + 1
        return max(0, min(self.window.length, room, self.bounds.positions - self.anchor))

    @property
    def most(self) -> int:
        """Most tokens that ``tokens`` may hold: its limit, and what the model has positions for."""
        return min(self.bounds.limit, self.bounds.positions - self.start)

    @property
    def pending(self) -> list[int]:
        """Settled tokens whose keys are not in the cache."""
        return self.tokens[self.cached :]

    @property
    def anchor(self) -> int:
        """First position of the noisy window."""
        return self.end + len(self.drafted.tokens)

    @property
    def end(self) -> int:
        """Position behind the last settled token."""
        return self.start + len(self.tokens)

    def span_at(self, index: int) -> int:
        """Whose text the settled or drafted token at ``index`` is."""
        number = bisect_right(self.entries.begins, index)
        return self.entries.spans[number - 1] if number else self.span

    @property
    def planning(self) -> bool:
        """True: what it writes now is no text."""
        return bool(self.hidden) and self.hidden[-1][1] > len(self.tokens)

    def ready(self) -> bool:
        """True: everything it depends on is finished."""
        return self.part is None or all(lane.done for lane in self.part.depends)

    def assumed_rightly(self) -> bool:
        """True: what it reads ahead of time ended as expected."""
        return all(lane.done and lane.tokens == tokens for lane, tokens in self.assumed)

    def settle(self, tokens: Sequence[int], terminators: Mapping[int, bool]) -> int:
        """Append ``tokens`` up to a terminator or the limit; marks the lane done when either is met.

        Args:
            terminators: token id -> True: it is a token of the text (``eos``), False: it only ends the lane.

        Returns:
            how many were appended.
        """
        for count, token in enumerate(tokens):
            if token in terminators:
                if terminators[token] and len(self.tokens) >= self.most:  # no room for it: the answer is cut before it
                    self.finish_full()
                    return count
                self.tokens += [token] * terminators[token]
                self.finish("end")
                return count + terminators[token]
            if len(self.tokens) >= self.most:
                self.finish_full()
                return count
            self.tokens.append(token)
        return len(tokens)

    def finish(self, reason: str) -> None:
        """No token will be added any more."""
        self.reason = reason
        self.drafted.tokens, self.window.fills = [], []

    def finish_full(self) -> None:
        """It holds as much as it may. Where positions end, so does the answer."""
        self.finish("limit" if self.bounds.limit == self.most else "length")

    def size(self, control: bool) -> int:
        """Length of ``text``."""
        held = len(self.tokens)
        if control:
            return held
        return held - sum(max(0, min(stop, held) - begin) for begin, stop in self.hidden)

    def behind(self, count: int, control: bool) -> int:
        """How many of ``tokens`` the first ``count`` of ``text`` reach to."""
        for begin, stop in () if control else self.hidden:
            count += (stop - begin) * (begin < count)
        return min(count, len(self.tokens))

    def text(self, control: bool = False) -> list[int]:
        """The settled tokens that are text; with ``control`` all of them."""
        if control or not self.hidden:
            return self.tokens
        keep: list[int] = []
        at = 0
        for begin, stop in self.hidden:
            keep += self.tokens[at:begin]
            at = max(at, min(stop, len(self.tokens)))
        return keep + self.tokens[at:]
