"""The forward process: times and hidden positions.

Catches: times outside their range or without stratification, blocks with nothing to learn, hidden padding, and a hiding
    rate
that is not t.
"""

from __future__ import annotations

import math

import pytest
import torch

from hf_hybrid.core.noising import draw_times, hide


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_times_are_in_range_and_repeat() -> None:
    times = draw_times(1000, generator(), all_masked=0.3, lowest=0.2)
    assert times.shape == (1000,) and times.dtype == torch.float32
    assert (times >= 0.2).all() and (times <= 1).all()
    assert torch.equal(times, draw_times(1000, generator(), all_masked=0.3, lowest=0.2))
    # Binomial(1000, 0.3): 5 standard deviations are 73; false alarm 6e-7 for another seed.
    assert abs(int((times == 1).sum()) - 300) <= 73


def test_times_are_stratified() -> None:
    times = draw_times(64, generator(), all_masked=0.0, lowest=0.0)
    # One point in every 64th of the unit interval, all shifted alike.
    gaps = times.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((63,), 1 / 64), atol=1e-6, rtol=0)  # float32 steps near 1 are 6e-8
    assert not torch.equal(times, times.sort().values)


@pytest.mark.parametrize("share, value", [(0.0, False), (1.0, True)])
def test_share_of_whole_blocks(share: float, value: bool) -> None:
    times = draw_times(50, generator(1), all_masked=share)
    assert bool((times == 1).all()) is value


def test_no_block() -> None:
    assert draw_times(0, generator()).shape == (0,)


def test_hidden_is_eligible_and_never_empty() -> None:
    g = generator(2)
    eligible = torch.rand(500, 12, generator=g) < 0.5
    eligible[0] = False
    hidden = hide(torch.full((500,), 0.01), eligible, g)
    assert hidden.shape == eligible.shape and hidden.dtype == torch.bool
    assert not (hidden & ~eligible).any()
    assert torch.equal(hidden.any(dim=-1), eligible.any(dim=-1))


def test_ends() -> None:
    eligible = torch.rand(40, 9, generator=generator(3)) < 0.7
    assert torch.equal(hide(torch.ones(40), eligible, generator(4)), eligible)
    assert torch.equal(hide(torch.zeros(40), eligible, generator(4)).sum(-1), eligible.any(-1).long())


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_rate_is_t(t: float) -> None:
    count = 200 * 100
    hidden = hide(torch.full((200,), t), torch.ones(200, 100, dtype=torch.bool), generator(5))
    # 5 standard deviations of a binomial: false alarm 6e-7 for another seed. The forced position needs an empty block:
    # 0.8^100.
    assert abs(hidden.double().mean().item() - t) < 5 * math.sqrt(t * (1 - t) / count)


def test_each_block_has_its_own_time() -> None:
    hidden = hide(torch.tensor([0.0, 1.0]), torch.ones(2, 50, dtype=torch.bool), generator(6))
    assert hidden.sum(-1).tolist() == [1, 50]
