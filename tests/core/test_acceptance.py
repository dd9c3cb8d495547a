"""The shared noise.

Catches: noise that depends on the batch or on the window, noise that repeats for other seeds or positions, infinite
noise, and a sampler that does not follow the softmax.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_hybrid.core.acceptance import keyed_noise, keyed_uniform, sample

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z &= WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def slow_noise(seed: int, position: int, vocab: int) -> Tensor:
    """SplitMix64 in whole numbers of Python."""
    state = mix(mix(seed + GOLDEN) + position * GOLDEN)
    uniform = [((mix(state + i * GOLDEN) >> 12) + 0.5) * 2.0**-52 for i in range(1, vocab + 1)]
    return torch.tensor([-math.log(-math.log(u)) for u in uniform])


def p_value(statistic: float, dof: int) -> float:
    """P(chi-square >= statistic) for an even number of degrees of freedom: a Poisson tail (Abramowitz and Stegun
    26.4.21)."""
    half = statistic / 2
    return math.exp(-half) * sum(half**k / math.factorial(k) for k in range(dof // 2))


def chi_square(counts: Tensor, probability: Tensor) -> float:
    expected = probability * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_oracle_is_splitmix64() -> None:
    # Published outputs of SplitMix64 for the seed 1234567.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [mix(1234567 + i * GOLDEN) for i in range(1, 6)] == known


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62, -5])
def test_noise_is_its_definition(seed: int) -> None:
    positions = [0, 1, 2, 4095, 2**40]
    noise = keyed_noise(seed, positions, 17)
    assert noise.dtype == torch.float32 and noise.shape == (5, 17)
    expected = torch.stack([slow_noise(seed, p, 17) for p in positions])
    torch.testing.assert_close(noise, expected, rtol=1e-6, atol=1e-6)  # float32 rounding of the last step


def test_noise_does_not_depend_on_its_neighbours() -> None:
    whole = keyed_noise(3, range(20), 50)
    assert torch.equal(keyed_noise(3, [7], 50)[0], whole[7])
    assert torch.equal(keyed_noise(3, [12, 4], 50), whole[[12, 4]])
    assert torch.equal(keyed_noise(3, range(20), 20), whole[:, :20])
    assert keyed_noise(3, [], 50).shape == (0, 50)


def test_a_seed_for_every_position() -> None:
    both = keyed_noise([3, 9], [7, 4], 50)
    assert torch.equal(both, torch.cat([keyed_noise(3, [7], 50), keyed_noise(9, [4], 50)]))
    uniform = keyed_uniform(3, range(2000))
    assert float(uniform.min()) > 0 and float(uniform.max()) < 1
    # Mean 1/2, variance 1/12; 5 standard errors: a false alarm in 1.7 million.
    assert abs(float(uniform.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 2000)


def test_noise_differs_by_seed_and_position() -> None:
    seeds = [*range(8), 2**32, 2**32 + 1, 2**62]
    rows = torch.cat([keyed_noise(seed, range(8), 4) for seed in seeds])
    assert len({tuple(row) for row in rows.tolist()}) == 8 * len(seeds)


def test_noise_is_standard_gumbel() -> None:
    noise = keyed_noise(11, range(100), 1000).double()
    assert noise.isfinite().all()
    n = noise.numel()
    # Mean gamma, variance pi^2 / 6 (fourth central moment 5.4 times its square); 5 standard errors: false alarm 6e-7
    # each.
    variance = math.pi**2 / 6
    assert abs(noise.mean().item() - 0.5772156649) < 5 * math.sqrt(variance / n)
    assert abs(noise.var().item() - variance) < 5 * variance * math.sqrt(4.4 / n)


def test_gumbel_max_follows_the_softmax() -> None:
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -float("inf"), 0.0])
    n = 20000
    tokens = sample(logits.expand(n, -1), keyed_noise(21, range(n), 6))
    counts = torch.bincount(tokens, minlength=6).double()
    assert counts[4] == 0  # banned
    possible = torch.tensor([0, 1, 2, 3, 5])
    statistic = chi_square(counts[possible], logits.double().softmax(-1)[possible])
    # Four degrees of freedom; a right sampler fails for one key in a million.
    assert p_value(statistic, 4) > 1e-6
    # The test has power: the law of a temperature of 0.9 is told apart.
    assert p_value(chi_square(counts[possible], (logits.double() / 0.9).softmax(-1)[possible]), 4) < 1e-6


@pytest.mark.parametrize("neighbour", ["position", "seed"])
def test_neighbouring_keys_are_independent(neighbour: str) -> None:
    n, p = 9000, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    logits = p.log().expand(n, -1)
    first = sample(logits, keyed_noise(5, range(n), 3))
    second = first.roll(1) if neighbour == "position" else sample(logits, keyed_noise(6, range(n), 3))
    counts = torch.bincount(3 * first + second, minlength=9).double()
    # Eight degrees of freedom (the margins are known); a right generator fails for one key in a million.
    assert p_value(chi_square(counts, torch.outer(p, p).flatten()), 8) > 1e-6


def test_sampling_in_bfloat16_keeps_the_law() -> None:
    n, vocab = 20000, 9
    tokens = sample(torch.zeros(n, vocab, dtype=torch.bfloat16), keyed_noise(2, range(n), vocab))
    counts = torch.bincount(tokens, minlength=vocab).double()
    assert p_value(chi_square(counts, torch.full((vocab,), 1 / vocab, dtype=torch.float64)), 8) > 1e-6
