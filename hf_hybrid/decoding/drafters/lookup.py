"""What followed the last tokens of a text where they occurred in it before (Saxena, "Prompt Lookup Decoding", 2023)."""

from __future__ import annotations

from collections.abc import Sequence

GRAMS = (3, 2)
"""Lengths of the tails that are looked up, the longest first."""


class Followers:
    """An index of one text that grows."""

    def __init__(self) -> None:
        self._tokens: Sequence[int] = ()
        self._read = 0  # tails that end before this place are in the index
        self._behind: dict[tuple[int, ...], int] = {}  # tail -> the place behind its last occurrence

    def read(self, tokens: Sequence[int]) -> None:
        """The text as it is now; what was read before has not changed."""
        self._tokens = tokens
        # The tail at the end is left out: nothing follows it yet.
        for end in range(self._read + 1, len(tokens)):
            for length in GRAMS:
                if length <= end:
                    self._behind[tuple(tokens[end - length : end])] = end
        self._read = max(self._read, len(tokens) - 1)

    def after(self, more: Sequence[int], count: int) -> list[int]:
        """Up to ``count`` tokens that may follow the text and ``more`` behind it; none when nothing is known."""
        longest = GRAMS[0]
        tail = (*self._tokens[-longest:], *more[-longest:])[-longest:]
        for length in GRAMS:
            place = self._behind.get(tail[-length:]) if length <= len(tail) else None
            if place is not None:
                return list(self._tokens[place : place + count])
        return []
