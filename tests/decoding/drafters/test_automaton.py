"""The suffix automaton against a search through all earlier positions.

Bugs these tests catch: a match that is shorter than the longest, or that ends at the text's own end; a state split that
loses an end; a match in a second automaton that survives the split of its state; time that grows with the square.
"""

from __future__ import annotations

import random
import time

import pytest

from hf_hybrid.decoding.drafters.automaton import Match, SuffixAutomaton


def longest_earlier(tokens: list[int]) -> int:
    """Length of the longest suffix that also ends before the last token."""
    for length in range(len(tokens) - 1, 0, -1):
        suffix = tokens[-length:]
        if any(tokens[end - length : end] == suffix for end in range(length, len(tokens))):
            return length
    return 0


def longest_inside(tokens: list[int], other: list[int]) -> int:
    """Length of the longest suffix of ``other`` that occurs in ``tokens``."""
    for length in range(min(len(other), len(tokens)), 0, -1):
        if any(tokens[at : at + length] == other[-length:] for at in range(len(tokens) - length + 1)):
            return length
    return 0


@pytest.mark.parametrize("kinds", [1, 2, 3, 6])
def test_the_longest_earlier_suffix(kinds: int) -> None:
    draw = random.Random(kinds)
    for _ in range(30):
        automaton, tokens = SuffixAutomaton(), []
        for _ in range(60):
            tokens.append(draw.randrange(kinds))
            automaton.extend(tokens[-1])
            length, end = automaton.suffix_length, automaton.suffix_end
            assert length == longest_earlier(tokens)
            assert (length == 0) == (end == -1) and end < len(tokens) - 1
            assert tokens[end + 1 - length : end + 1] == tokens[len(tokens) - length :]
        assert automaton.tokens == tokens


def test_the_latest_place_is_taken() -> None:
    # "1 2" was followed by 3, then by 4.
    automaton = SuffixAutomaton([1, 2, 3, 1, 2, 4, 1, 2])
    assert (automaton.suffix_length, automaton.tokens[automaton.suffix_end + 1]) == (2, 4)


@pytest.mark.parametrize("kinds", [2, 4])
def test_a_match_in_an_automaton_that_grows_meanwhile(kinds: int) -> None:
    draw = random.Random(kinds)
    for _ in range(40):
        automaton = SuffixAutomaton([draw.randrange(kinds) for _ in range(12)])
        match, other = Match(automaton), []
        for _ in range(60):
            if draw.random() < 0.3:
                automaton.extend(draw.randrange(kinds))
            other.append(draw.randrange(kinds))
            match.advance(other[-1])
            # A suffix may have come in with what was added since; what was matched before can only be missed by that.
            assert match.length <= longest_inside(automaton.tokens, other)
            assert automaton.tokens[match.end + 1 - match.length : match.end + 1] == other[len(other) - match.length :]
        fixed = Match(automaton)
        for count, token in enumerate(other, 1):
            fixed.advance(token)
            assert fixed.length == longest_inside(automaton.tokens, other[:count])


def test_states_grow_with_the_text_and_not_with_its_square() -> None:
    for tokens in ([7] * 4000, [i % 5 for i in range(4000)], [random.Random(0).randrange(50) for _ in range(4000)]):
        automaton = SuffixAutomaton(tokens)
        # Blumer et al., 1985: at most 2n - 1 states and 3n - 4 transitions.
        assert len(automaton._length) <= 2 * 4000
        assert sum(map(len, automaton._next)) <= 3 * 4000


def test_a_token_takes_microseconds() -> None:
    tokens = [random.Random(1).randrange(400) for _ in range(20000)]
    started = time.perf_counter()
    SuffixAutomaton(tokens)
    # A few microseconds each; a hundred times as much is a square law, on any machine.
    assert (time.perf_counter() - started) / len(tokens) < 5e-4
