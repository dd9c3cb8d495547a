"""Noise schedules: ends, derivative, loss weight, unmask counts.

Catches: a schedule whose derivative belongs to another one, a loss weight that loses its digits near t = 0 or changes
    sign, and
unmask counts that lose or invent positions or pile the remainder on one step.
"""

from __future__ import annotations

import pytest
import torch

from hf_hybrid.core.schedules import SCHEDULES, unmask_counts

NAMES = sorted(SCHEDULES)


@pytest.mark.parametrize("name", NAMES)
def test_ends_and_fall(name: str) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = SCHEDULES[name].alpha(t)
    # cos(pi / 2) in float64 is 6e-17, not 0.
    torch.testing.assert_close(alpha[[0, -1]], torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-15, rtol=0)
    assert (alpha.diff() < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_derivative_is_the_numeric_one(name: str) -> None:
    t, h = torch.linspace(0.01, 0.99, 99, dtype=torch.float64), 1e-5
    numeric = (SCHEDULES[name].alpha(t + h) - SCHEDULES[name].alpha(t - h)) / (2 * h)
    # Central difference: h^2 / 6 * |alpha'''| < 7e-11 and rounding 1e-16 / h = 1e-11.
    torch.testing.assert_close(SCHEDULES[name].derivative(t), numeric, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_loss_weight(name: str) -> None:
    t = torch.linspace(1e-3, 1, 500, dtype=torch.float64)
    schedule = SCHEDULES[name]
    weight = schedule.loss_weight(t)
    assert (weight > 0).all() and weight.isfinite().all()
    torch.testing.assert_close(weight, -schedule.derivative(t) / (1 - schedule.alpha(t)))
    # float32 in, float32 out, and right to float32 rounding of t and of the result even at the smallest t.
    single = schedule.loss_weight(t.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), weight, rtol=1e-6, atol=0)
    assert schedule.loss_weight(torch.zeros(1)).isfinite().all()


def test_linear_weight_is_one_over_t() -> None:
    t = torch.tensor([0.1, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(SCHEDULES["linear"].loss_weight(t), 1 / t)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 16, 40])
def test_unmask_counts_sum_and_follow_the_schedule(name: str, steps: int) -> None:
    num_open = torch.tensor([0, 1, 2, 3, 8, 15, 16, 31, 100])
    counts = unmask_counts(num_open, steps, name)
    assert counts.shape == (9, steps) and counts.dtype == torch.long
    assert (counts >= 0).all()
    assert torch.equal(counts.sum(dim=-1), num_open)
    # After k steps the settled number is the scheduled share, rounded: never more than half a token away.
    time = 1 - torch.arange(1, steps + 1, dtype=torch.float64) / steps
    share = SCHEDULES[name].alpha(time) * num_open.unsqueeze(-1)
    assert ((counts.cumsum(dim=-1) - share).abs() <= 0.5 + 1e-9).all()


def test_linear_counts_spread_the_remainder() -> None:
    for num_open in range(1, 40):
        counts = unmask_counts(torch.tensor([num_open]), 8)[0]
        # Equal shares but for rounding: two roundings of half a token each.
        assert (counts - num_open / 8).abs().max() <= 1


def test_steps_as_a_tensor_and_errors() -> None:
    assert torch.equal(unmask_counts(torch.tensor([5]), torch.tensor(2)), unmask_counts(torch.tensor([5]), 2))
    with pytest.raises(ValueError, match="at least one"):
        unmask_counts(torch.tensor([5]), 0)
    with pytest.raises(ValueError, match="cosine"):
        unmask_counts(torch.tensor([5]), 2, "sine")
