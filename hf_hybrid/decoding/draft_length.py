"""How long a draft should be, and whether to draft at all, from what passes cost and how often drafts are accepted.

With ``k`` drafted tokens of which token ``i`` is accepted with chance ``a_i`` if those before it are, a pass writes
``1 + a_1 + a_1 a_2 + ...`` tokens (Leviathan et al., 2023, section 3.3) and takes ``seconds(rows)``. The length with
the most tokens per second is taken; when that is none, drafting is off but for probes, whose loss is bounded. All this
changes time, not text.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any
from weakref import WeakKeyDictionary

_KNOWN_FROM = 2.0  # the chance that a drafter claims counts as so many observed tokens
_KNOWN_FROM_COSTLY = 6.0
"""The same for a drafter that takes passes of its own, whose drafts do not differ as much from text to text: with 2 a
draft or two that were rejected early switched it off, and probes are too rare to find that out soon."""
_KEPT = 0.97  # weight of the past when a draft is added
_GAIN = 1.03  # a draft must promise so much more than none
PROBE_SHARE = 0.02
"""Share of the time that probes may cost while drafting does not pay."""


def group_of(depth: int) -> int:
    """Depths of a draft that are counted together: 0, 1, 2 and 3, 4 to 7, and so on."""
    return depth.bit_length()


@dataclass
class Acceptance:
    """Running conditional acceptance per bucket and depth: how often a token is accepted if those before it are.

    Attributes:
        counts: (bucket, depths) -> (accepted, tried). known_from: so many observed tokens count as what was expected.
    """

    known_from: float = _KNOWN_FROM
    counts: dict[tuple[Hashable, int], tuple[float, float]] = field(default_factory=dict)  # -> (accepted, tried)

    def note(self, bucket: Hashable, length: int, accepted: int) -> None:
        """``accepted`` of ``length`` drafted tokens were accepted."""
        seen: set[int] = set()
        for depth in range(min(accepted + 1, length)):
            key = (bucket, group_of(depth))
            good, tried = self.counts.get(key, (0.0, 0.0))
            kept = 1.0 if group_of(depth) in seen else _KEPT
            seen.add(group_of(depth))
            self.counts[key] = (kept * good + (depth < accepted), kept * tried + 1)

    def note_one(self, bucket: Hashable, depth: int, accepted: bool) -> None:
        """One token at ``depth`` of a tree was checked, behind accepted tokens."""
        key = (bucket, group_of(depth))
        good, tried = self.counts.get(key, (0.0, 0.0))
        self.counts[key] = (_KEPT * good + accepted, _KEPT * tried + 1)

    def chances(self, bucket: Hashable, chance: float, length: int) -> list[float]:
        """For each of ``length`` depths, between what was observed and the drafter's own ``chance``. A depth that was
        seldom reached is expected to be like the one before it."""
        known: dict[int, float] = {}
        for depth in range(length):
            if (group := group_of(depth)) not in known:
                known[group] = chance = self._between(bucket, group, chance)
        return [known[group_of(depth)] for depth in range(length)]

    def refined(self, bucket: Hashable, expected: Sequence[float]) -> list[float]:
        """For each depth, between what was observed here and what is ``expected``."""
        return [self._between(bucket, group_of(depth), chance) for depth, chance in enumerate(expected)]

    def _between(self, bucket: Hashable, group: int, expected: float) -> float:
        good, tried = self.counts.get((bucket, group), (0.0, 0.0))
        return (good + self.known_from * expected) / (tried + self.known_from)


@dataclass
class Experience:
    """What is known of the drafts of one drafter for one model.

    Attributes:
        acceptance: over all texts. seconds_per_token: to make a draft, per depth; 0: none was made yet.
        offered: running share of the drafts asked for that held a token, 0 to 1.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    seconds_per_token: float = 0.0
    offered: float = 1.0

    def note_made(self, seconds: float, depths: int, offered: float) -> None:
        """Drafts of up to ``depths`` depths took ``seconds``; the share ``offered`` of them held a token. An outlier
        counts as twice what was expected."""
        each = seconds / max(depths, 1)
        if not self.seconds_per_token:
            self.seconds_per_token = each
        elif offered:  # what it takes to find nothing to draft says little about a token
            self.seconds_per_token += 0.2 * (min(each, 2 * self.seconds_per_token) - self.seconds_per_token)
        self.offered += 0.1 * (offered - self.offered)


_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Hashable, Experience]]] = WeakKeyDictionary()
"""Drafting model, or drafter -> model -> class of the drafter and where the model runs -> what is known."""


def experience_of(drafter: Any, model: Any, where: Hashable = None) -> Experience:
    """What is known of ``drafter`` for ``model`` on its device (``where``). Of a costly one it outlives a call, as
    the cost model does."""
    if not drafter.costly:
        return Experience()
    key = drafter if drafter.model is None else drafter.model
    new = Experience(Acceptance(_KNOWN_FROM_COSTLY))
    try:
        own = _known.setdefault(key, WeakKeyDictionary()).setdefault(model, {})
    except TypeError:  # no key of a dict, or of a weak one
        return new
    return own.setdefault((type(drafter).__name__, where), new)


def acceptance_of_text(costly: bool) -> Acceptance:
    """Nothing is known of one text."""
    return Acceptance(_KNOWN_FROM_COSTLY if costly else _KNOWN_FROM)


@dataclass
class DraftLength:
    """Chooses the length of the drafts of a pass.

    Attributes:
        cost: rows of a pass, all sequences together -> seconds.
        spent: seconds of all passes and drafts. lost: seconds that probes cost beyond what they brought.
    """

    cost: Callable[[int], float]
    spent: float = 0.0
    lost: float = 0.0

    def choose(
        self,
        rows: Sequence[int],
        chances: Sequence[Sequence[float]],
        seconds_per_token: float = 0.0,
        offered: float = 1.0,
    ) -> tuple[int, bool]:
        """The longest draft that any sequence of the next pass may have.

        Args:
            rows: clean rows of each sequence without a draft. chances: for each of its drafted tokens, the chance that
                it is accepted if those before it are. seconds_per_token: to make a draft, per depth. offered: the
                chance that a text has a draft at all; the first depth of one is paid for even if not.

        Returns:
            the length, 0: none; and True: it is a probe, not expected to pay.
        """
        return self.choose_nodes(rows, [list(accumulate(c, mul)) for c in chances], seconds_per_token, offered)

    def choose_nodes(
        self,
        rows: Sequence[int],
        standing: Sequence[Sequence[float]],
        seconds_per_token: float = 0.0,
        offered: float = 1.0,
    ) -> tuple[int, bool]:
        """The same for trees: ``standing`` is the chance that a token is accepted at all, which is what it adds."""
        reach = max((len(c) for c in standing), default=0)
        if reach == 0:
            return 0, False
        written = float(len(rows))
        plain = self.cost(len(rows) * max(rows))
        # (tokens per second, length, seconds, tokens)
        best = without = (written / plain, 0, plain, written)
        some = 1 - (1 - offered) ** len(rows)  # the chance that any text has a draft, and the pass is wider
        first: tuple[float, int, float, float] | None = None
        for length in range(1, reach + 1):
            width = 0
            for row, own in enumerate(standing):
                width = max(width, rows[row] + min(length, len(own)))
                if length <= len(own):
                    written += offered * own[length - 1]
            wider = self.cost(len(rows) * width) - plain
            seconds = plain + some * wider + (1 + some * (length - 1)) * seconds_per_token
            option = (written / seconds, length, seconds, written)
            best = max(best, option)
            first = option if first is None else max(first, option)
        assert first is not None
        if best[1] and best[0] >= _GAIN * without[0]:
            return best[1], False
        return (first[1], True) if self.may_lose(first[2] - plain) else (0, False)

    def may_lose(self, seconds: float) -> bool:
        """True: a probe that loses so much is within its share."""
        return self.lost + seconds <= PROBE_SHARE * self.spent

    def note(self, seconds: float, probed: bool, plain: float, written: float) -> None:
        """A pass and its drafts took ``seconds`` and wrote ``written`` tokens per sequence; a pass alone takes
        ``plain``."""
        self.spent += seconds
        if probed:
            self.lost = max(0.0, self.lost + seconds - written * plain)
