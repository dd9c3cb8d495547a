"""What is known of the tokens of a tree: their ranks, and how likely they are accepted.

None of it can change a text, so that no test of texts sees a fault: a chance of the wrong depth or rank, ranks of other
tokens behind a cut.
"""

from __future__ import annotations

from typing import Any

from hf_hybrid import Draft
from hf_hybrid.decoding.branches import depth, pruned, rank_of, standing


def test_how_likely_each_token_stands() -> None:
    #  1 -> 3 -> 4 (a second guess), 2 is a second guess
    draft = Draft([1, 2, 3, 4], None, "kind", 0.6, parents=(-1, -1, 0, 2), ranks=(0, 1, 0, 1))
    asked: list[tuple[Any, float, int]] = []

    def chances(bucket: Draft, length: int) -> list[float]:
        asked.append((bucket.bucket, bucket.chance, length))
        return [0.5, 0.25, 0.2] if bucket.bucket == "kind" else [0.125, 0.1, 0.0625]

    assert standing(draft, chances) == [0.5, 0.125, 0.5 * 0.25, 0.5 * 0.25 * 0.0625]
    assert sorted(asked, key=str) == sorted([("kind", 0.6, 3), (("kind", 1), 0.2, 3)], key=str)
    assert rank_of(draft, 0).bucket == "kind" and rank_of(draft, 3).chance == 0.05


def test_what_is_cut_keeps_the_ranks_of_the_rest() -> None:
    draft = Draft([7, 8, 9, 5, 6, 7, 4], parents=(-1, 0, 0, 1, 2, -1, 5), ranks=(0, 0, 1, 0, 2, 1, 3))
    ended = pruned(draft, 100, 100, {8})
    assert (list(ended.tokens), ended.ranks) == ([7, 9, 6, 4], (0, 1, 2, 3))


def test_the_depth_of_a_tree_is_that_of_its_longest_branch() -> None:
    assert depth(Draft([5, 6, 7])) == 3 and depth(Draft([])) == 0
    assert depth(Draft([5, 6, 7, 8], parents=(-1, 0, -1, 2))) == 2
    assert depth(Draft([5, 6, 7], parents=(-1, 9, 1))) == 2, "no tree: refused later, where it is checked"
