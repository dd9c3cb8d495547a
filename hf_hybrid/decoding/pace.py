"""Pace: how long a draft should be, and whether to draft at all, from what passes cost and how often drafts stand.

With ``k`` drafted tokens of which token ``i`` stands with chance ``a_i`` if those before it do, a pass writes
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
draft or two that fell early switched it off, and probes are too rare to find that out soon."""
_KEPT = 0.97  # weight of the past when a draft is added
_GAIN = 1.03  # a draft must promise so much more than none
PROBE_SHARE = 0.02
"""Share of the time that probes may cost while drafting does not pay."""


def bucket(place: int) -> int:
    """Places of a draft that are counted together: 0, 1, 2 and 3, 4 to 7, and so on."""
    return place.bit_length()


@dataclass
class Acceptance:
    """Running conditional acceptance per grade and place: how often a token stands if those before it do.

    Attributes:
        counts: (grade, places) -> (stood, tried). known_from: so many observed tokens count as what was expected.
    """

    known_from: float = _KNOWN_FROM
    counts: dict[tuple[Hashable, int], tuple[float, float]] = field(default_factory=dict)  # -> (stood, tried)

    def note(self, grade: Hashable, length: int, stood: int) -> None:
        """``stood`` of ``length`` drafted tokens stand."""
        seen: set[int] = set()
        for place in range(min(stood + 1, length)):
            key = (grade, bucket(place))
            good, tried = self.counts.get(key, (0.0, 0.0))
            kept = 1.0 if bucket(place) in seen else _KEPT
            seen.add(bucket(place))
            self.counts[key] = (kept * good + (place < stood), kept * tried + 1)

    def note_one(self, grade: Hashable, place: int, stood: bool) -> None:
        """One token at ``place`` of a tree was checked, behind tokens that stand."""
        key = (grade, bucket(place))
        good, tried = self.counts.get(key, (0.0, 0.0))
        self.counts[key] = (_KEPT * good + stood, _KEPT * tried + 1)

    def chances(self, grade: Hashable, chance: float, length: int) -> list[float]:
        """For each of ``length`` places, between what was observed and the drafter's own ``chance``. A place that was
        seldom reached is expected to be like the one before it."""
        known: dict[int, float] = {}
        for place in range(length):
            if (group := bucket(place)) not in known:
                known[group] = chance = self._between(grade, group, chance)
        return [known[bucket(place)] for place in range(length)]

    def refined(self, grade: Hashable, expected: Sequence[float]) -> list[float]:
        """For each place, between what was observed here and what is ``expected``."""
        return [self._between(grade, bucket(place), chance) for place, chance in enumerate(expected)]

    def _between(self, grade: Hashable, group: int, expected: float) -> float:
        good, tried = self.counts.get((grade, group), (0.0, 0.0))
        return (good + self.known_from * expected) / (tried + self.known_from)


@dataclass
class Experience:
    """What is known of the drafts of one drafter for one model.

    Attributes:
        acceptance: over all texts. seconds_per_token: to make a draft, per place; 0: none was made yet.
        offered: running share of the drafts asked for that held a token, 0 to 1.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    seconds_per_token: float = 0.0
    offered: float = 1.0

    def note_made(self, seconds: float, places: int, offered: float) -> None:
        """Drafts of up to ``places`` places took ``seconds``; the share ``offered`` of them held a token. An outlier
        counts as twice what was expected."""
        each = seconds / max(places, 1)
        if not self.seconds_per_token:
            self.seconds_per_token = each
        elif offered:  # what it takes to find nothing to draft says little about a token
            self.seconds_per_token += 0.2 * (min(each, 2 * self.seconds_per_token) - self.seconds_per_token)
        self.offered += 0.1 * (offered - self.offered)


_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Hashable, Experience]]] = WeakKeyDictionary()
"""Drafting model, or drafter -> model -> class of the drafter and where the model runs -> what is known."""


def experience_of(drafter: Any, model: Any, where: Hashable = None) -> Experience:
    """What is known of ``drafter`` for ``model`` on its device (``where``). Of a costly one it outlives a call, as
    prices do."""
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
class Pace:
    """Chooses the length of the drafts of a pass.

    Attributes:
        price: rows of a pass, all batch rows together -> seconds.
        spent: seconds of all passes and drafts. lost: seconds that probes cost beyond what they brought.
    """

    price: Callable[[int], float]
    spent: float = 0.0
    lost: float = 0.0

    def choose(
        self,
        rows: Sequence[int],
        chances: Sequence[Sequence[float]],
        seconds_per_token: float = 0.0,
        offered: float = 1.0,
    ) -> tuple[int, bool]:
        """The longest draft that any batch row of the next pass may have.

        Args:
            rows: clean rows of each batch row without a draft. chances: for each of its drafted tokens, the chance that
                it stands if those before it do. seconds_per_token: to make a draft, per place. offered: the chance that
                a text has a draft at all; the first place of one is paid for even if not.

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
        """The same for trees: ``standing`` is the chance that a token stands at all, which is what it adds."""
        reach = max((len(c) for c in standing), default=0)
        if reach == 0:
            return 0, False
        written = float(len(rows))
        plain = self.price(len(rows) * max(rows))
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
            wider = self.price(len(rows) * width) - plain
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
        """A pass and its drafts took ``seconds`` and wrote ``written`` tokens per batch row; a pass alone takes
        ``plain``."""
        self.spent += seconds
        if probed:
            self.lost = max(0.0, self.lost + seconds - written * plain)
