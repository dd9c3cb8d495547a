"""Which positions settle, against nested loops.

Catches: a closed position that is taken instead of an open one, ties that go right, lanes that settle nothing for ever,
    a prefix
that jumps over an unsure position, entropy that is NaN at banned tokens, and a margin taken against the token itself.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_hybrid.core.selection import scores, settle


def slow_settle(
    score: Tensor, open: Tensor, threshold: float, count: Tensor | None, prefix: bool, least: int
) -> Tensor:
    out = torch.zeros_like(open)
    for lane in range(open.shape[0]):
        positions = [i for i in range(open.shape[1]) if open[lane, i]]
        values = score[lane].tolist()
        if not prefix:
            positions.sort(key=lambda i: (-values[i], i))
        wanted = least if count is None else max(least, int(count[lane]))
        unbroken = True
        for rank, i in enumerate(positions):
            sure = values[i] >= threshold
            unbroken = unbroken and sure
            out[lane, i] = rank < wanted or (unbroken if prefix else sure)
    return out


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_settle_is_the_loop(seed: int, prefix: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 5, (40, 7), generator=g) / 4.0  # few values, so many ties
    open = torch.rand(40, 7, generator=g) < 0.7
    for threshold in (0.0, 0.5, 0.75, 1.0, 1.5):
        for least in (0, 1, 2):
            for count in (None, torch.randint(0, 9, (40,), generator=g)):
                got = settle(score, open, threshold, count, prefix, least)
                assert torch.equal(got, slow_settle(score, open, threshold, count, prefix, least))


@pytest.mark.parametrize("prefix", [False, True])
def test_every_lane_moves_and_nothing_closed_settles(prefix: bool) -> None:
    g = torch.Generator().manual_seed(9)
    score, open = torch.rand(60, 5, generator=g), torch.rand(60, 5, generator=g) < 0.4
    settled = settle(score, open, threshold=2.0, prefix=prefix)
    assert torch.equal(settled.sum(-1), open.any(-1).long())
    assert not (settled & ~open).any()


def test_a_closed_score_takes_no_place() -> None:
    score = torch.tensor([[float("-inf"), float("-inf"), 0.9]])
    open = torch.tensor([[False, True, False]])
    assert settle(score, open, 0.5).tolist() == [[False, True, False]]


def test_prefix_stops_at_the_first_unsure_position() -> None:
    score = torch.tensor([[0.9, 0.9, 0.1, 0.9]])
    open = torch.ones(1, 4, dtype=torch.bool)
    assert settle(score, open, 0.5, prefix=True).tolist() == [[True, True, False, False]]
    assert settle(score, open, 0.5).tolist() == [[True, True, False, True]]
    assert settle(score, open, 0.5, count=torch.tensor([3]), prefix=True).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_their_definitions(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(4, 5, 9, generator=g)).to(dtype)
    p = logits.double().softmax(-1)
    top = p.sort(dim=-1, descending=True).values
    expected = {
        "confidence": top[..., 0],
        "margin": top[..., 0] - top[..., 1],
        "entropy": 1 + (p * p.log()).sum(-1) / math.log(9),
    }
    for kind, value in expected.items():
        score, token = scores(logits, kind)  # type: ignore[arg-type]
        assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(token, logits.argmax(-1))
        # float32 softmax of nine entries: a few units of 6e-8.
        torch.testing.assert_close(score.double(), value, atol=1e-12 if dtype == torch.float64 else 1e-6, rtol=0)


def test_a_sampled_token_has_its_own_confidence_and_margin() -> None:
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 8, generator=g, dtype=torch.float64)
    token = torch.randint(0, 8, (6,), generator=g)
    p = logits.softmax(-1)
    own = p[torch.arange(6), token]
    others = p.clone()
    others[torch.arange(6), token] = -1.0
    for kind, value in (("confidence", own), ("margin", own - others.max(-1).values)):
        score, kept = scores(logits, kind, token=token)  # type: ignore[arg-type]
        assert torch.equal(kept, token)
        torch.testing.assert_close(score, value)


def test_limits_of_the_scores() -> None:
    inf = float("inf")
    one_left, flat = torch.tensor([[0.0, -inf, -inf]]), torch.zeros(1, 3)
    for kind, sure, unsure in (("confidence", 1.0, 1 / 3), ("margin", 1.0, 0.0), ("entropy", 1.0, 0.0)):
        assert scores(one_left, kind)[0].item() == pytest.approx(sure, abs=1e-6)  # type: ignore[arg-type]
        assert scores(flat, kind)[0].item() == pytest.approx(unsure, abs=1e-6)  # type: ignore[arg-type]


def test_random_scores_and_errors() -> None:
    logits, uniform = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3)), torch.rand(2, 3)
    score, token = scores(logits, "random", uniform=uniform)
    assert torch.equal(score, uniform) and torch.equal(token, logits.argmax(-1))
    with pytest.raises(ValueError, match="uniform"):
        scores(logits, "random")
    with pytest.raises(ValueError, match="margin"):
        scores(logits, "certainty")  # type: ignore[arg-type]
