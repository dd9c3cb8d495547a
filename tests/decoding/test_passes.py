"""Rows of a pass, and what windows draft.

Catches: filler rows that take the slots of rows that stay or that are read, filler where the host makes its own mask,
drafts that go on behind a wrong token, and wrong guesses that throw the rest of a plan away.
"""

from __future__ import annotations

import pytest

from hf_hybrid.core.canvas import Canvas
from hf_hybrid.core.lane import Lane, Window
from hf_hybrid.core.rows import PADDING
from hf_hybrid.decoding.denoise import Proposal
from hf_hybrid.decoding.passes import build_pass

GUESSES = frozenset({90, 91})


def canvas(*lanes: Lane) -> Canvas:
    return Canvas(0, 0, [1, 2, 3], 50, lanes=list(lanes), num_spans=len(lanes))


def trunk(cached: int = 3) -> Lane:
    return Lane("trunk", 0, 0, [1, 2, 3], cached=cached)


def part(span: int, tokens: list[int], window: int = 0) -> Lane:
    return Lane("span", span, 3, tokens, window=Window(window), cached=len(tokens) - 1)


def up_to_five(rows: int) -> int:
    return max(rows, 5) if rows > 1 else rows


def test_few_rows_are_filled_behind_the_others() -> None:
    trunk_lane = trunk()
    trunk_lane.finish("end")
    batch = build_pass([canvas(trunk_lane, part(1, [7, 8]), part(2, [9]))], 60, filled=up_to_five)
    assert batch.tokens[0, :2].tolist() == [8, 9] and batch.rows.span.tolist() == [[1, 2, PADDING, PADDING, PADDING]]
    assert [list(rows.checks) for rows in batch.lanes] == [[0], [1]]
    assert [batch.flat(0, rows.checks[0]) for rows in batch.lanes] == [0, 1] and batch.keep == 5


@pytest.mark.parametrize(
    ("lanes", "width"),
    [([trunk(2)], 1), ([trunk(1)], 2), ([part(1, [7], window=5)], 6)],
    ids=["one row", "the host's mask", "enough rows"],
)
def test_other_passes_are_not_filled(lanes: list[Lane], width: int) -> None:
    batch = build_pass([canvas(*lanes)], 60, filled=up_to_five)
    assert batch.tokens.shape == (1, width) and (batch.rows.span != PADDING).all()


def test_a_batch_is_not_filled() -> None:
    finished = trunk()
    finished.finish("end")
    two = [canvas(finished, part(1, [7])) for _ in range(2)]
    assert build_pass(two, 60, filled=up_to_five).tokens.shape == (2, 1)


@pytest.mark.parametrize(
    ("tokens", "score", "first", "draft"),
    [
        ([5, 6, 7], [0.9, 0.9, 0.9], 5, [6, 7]),
        ([5, 6, 7], [0.1, 0.9, 0.5], 5, [6]),  # the first score does not matter: clean rows wrote it
        ([5, 6, 7], [0.9, 0.9, 0.9], 4, []),
        ([90, 6, 7], [0.9, 0.9, 0.9], 91, [6, 7]),
        ([90, 6, 7], [0.9, 0.9, 0.9], 5, []),
        ([5, 6, 7], [0.9, 0.9, 0.9], 91, []),
        ([5, 90, 7], [0.9, 0.1, 0.9], 5, [90, 7]),
        ([5, 6, 90], [0.9, 0.1, 0.9], 5, []),
    ],
)
def test_a_draft_goes_on_behind_guesses_alone(
    tokens: list[int], score: list[float], first: int, draft: list[int]
) -> None:
    assert Proposal(tokens, score, [False] * len(tokens)).draft(first, 0.6, GUESSES) == draft
