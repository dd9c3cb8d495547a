"""Coherence against sums by hand.

Catches: a likelihood that is one token late, seams that begin with the heading itself, headings that overlap or are
at the end, tokens that are counted twice.
"""

from __future__ import annotations

import pytest
import torch

from hf_hybrid.evaluation.coherence import SEAM, Coherence, coherence, seams
from tests.models_for_tests import hybrid


def test_seams_are_the_tokens_behind_a_heading() -> None:
    text = [7, 8, *range(20, 32), 7, 8, 30]
    assert seams(text, {(7, 8)}) == [False] * 2 + [True] * SEAM + [False] * 6 + [True]
    assert seams([7, 7, 1], {(7,)}) == [False, True, True]
    assert seams([1, 2, 7], {(7,), (9, 9)}) == [False] * 3
    assert seams([], {(7,)}) == []


def test_the_sums_are_those_of_every_token_alone() -> None:
    model = hybrid(seed=26)
    prompt, text = [3, 7, 9], [5, 6, 8, 11, 12, 5, 4]
    found = coherence(model, prompt, text, {(5,)})
    expected = []
    for position in range(len(text)):
        ids = torch.tensor([prompt + text[:position]])
        expected.append(-float(model(input_ids=ids).logits[0, -1].detach().double().log_softmax(-1)[text[position]]))
    # Everything behind the first 5 is within 8 tokens of it; the 5 itself is not.
    assert (found.seam_tokens, found.middle_tokens) == (6, 1)
    assert found.middle_nll == pytest.approx(expected[0], abs=1e-6)
    assert found.seam_nll == pytest.approx(sum(expected[1:]), abs=1e-6)


def test_an_empty_answer_has_no_coherence() -> None:
    assert coherence(hybrid(seed=26), [3], [], {(5,)}) == Coherence(0.0, 0, 0.0, 0)
