"""A suffix automaton over token ids: where were the last words before, and what followed them?

Source: Blumer et al., "The Smallest Automaton Recognizing the Subwords of a Text", 1985; for drafting: Hu et al.,
"SAM Decoding: Speculative Decoding via Suffix Automaton", 2024. Ours keeps for every state its latest end instead of
its first, as far as a bounded walk reaches: what was written last is the best guess.
"""

from __future__ import annotations

from collections.abc import Iterable

_WALK = 8  # states whose latest end a new token updates; deeper ones keep an older end, which is right too


class SuffixAutomaton:
    """All substrings of a growing sequence. ``extend`` takes amortised constant time and memory.

    Attributes:
        tokens: the sequence. suffix_length: length of the longest suffix that also occurs earlier. suffix_end: index
            of the last token of that earlier place, -1 when ``suffix_length`` is 0.
    """

    def __init__(self, tokens: Iterable[int] = ()):
        self.tokens: list[int] = []
        self.suffix_length, self.suffix_end = 0, -1
        # Per state: length of its longest string, suffix link, transitions, latest known end.
        self._length, self._link, self._next, self._end = [0], [-1], [dict[int, int]()], [-1]
        self._last = 0
        for token in tokens:
            self.extend(token)

    def extend(self, token: int) -> None:
        """Append one token."""
        length, link, moves, end = self._length, self._link, self._next, self._end
        at = len(self.tokens)
        self.tokens.append(token)
        new = len(length)
        length.append(length[self._last] + 1)
        link.append(0)
        moves.append({})
        end.append(at)
        state = self._last
        while state >= 0 and token not in moves[state]:
            moves[state][token] = new
            state = link[state]
        if state >= 0:
            target = moves[state][token]
            if length[state] + 1 == length[target]:
                link[new] = target
            else:
                clone = len(length)
                length.append(length[state] + 1)
                link.append(link[target])
                moves.append(dict(moves[target]))
                end.append(end[target])
                while state >= 0 and moves[state].get(token) == target:
                    moves[state][token] = clone
                    state = link[state]
                link[target] = link[new] = clone
        self._last = new
        above = link[new]
        self.suffix_length, self.suffix_end = length[above], end[above] if above else -1
        for _ in range(_WALK):
            if above <= 0:
                break
            end[above] = at
            above = link[above]


class Match:
    """The longest suffix of a second text that occurs in an automaton, which may grow meanwhile.

    Attributes:
        length: of that suffix. end: index of its last token in the automaton's sequence, -1 when ``length`` is 0.
    """

    def __init__(self, automaton: SuffixAutomaton):
        self._automaton = automaton
        self._state, self.length, self.end = 0, 0, -1

    def advance(self, token: int) -> None:
        """The second text grew by ``token``."""
        automaton = self._automaton
        length, link, moves = automaton._length, automaton._link, automaton._next
        state, matched = self._state, self.length
        while state and matched <= length[link[state]]:  # the state was split since
            state = link[state]
        while state and token not in moves[state]:
            state = link[state]
            matched = length[state]
        following = moves[state].get(token)
        if following is None:
            self._state, self.length, self.end = 0, 0, -1
        else:
            self._state, self.length, self.end = following, matched + 1, automaton._end[following]
