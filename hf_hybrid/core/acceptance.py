"""How much of a draft is accepted, and the shared noise that makes sampled text checkable token by token.

A greedy draft is checked by equality. A sampled one is too, when draft and check draw with the *same* noise: the
Gumbel-max trick makes a sample a deterministic function of logits and noise, so an equal draft is exactly the token
that plain decoding would have drawn, and the text follows the target's law whatever the drafter does. The noise is
keyed by seed and position, so that it does not depend on the batch, on the window, or on how many passes were made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_hybrid.core.precision import double_device

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # odd, close to 2^64 / golden ratio: the step of SplitMix64


def keyed_noise(
    seed: int | Sequence[int], positions: Sequence[int], vocab: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard Gumbel noise that is a pure function of seed, position and token id.

    Row i is the SplitMix64 stream (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014) whose
    state is ``mix(mix(seed) + GOLDEN * position)``. Being counter-based (Salmon et al., "Parallel Random Numbers: As
    Easy as 1, 2, 3", 2011) it is one batched operation on any device, and all 64 bits of the key count; torch's own CPU
    generator keeps the low 32 bits of its seed.

    Args:
        seed: any whole number, taken modulo 2^64; or one for each position.
        positions: places in the answer, one per row.
        vocab: number of token ids.
        device: where the noise is wanted; it is made there, or on the CPU where the device has no float64.

    Returns:
        float32 ``(positions, vocab)``, ``-log(-log(u))`` with u uniform on (0, 1) in float64, hence finite, from -3.7
        to 36.8.
    """
    seeds = [seed] if isinstance(seed, int) else seed
    made = double_device(device)
    base = _mix(torch.tensor([_signed(s + _GOLDEN) for s in seeds], dtype=torch.long, device=made))  # (1,) or alike
    place = torch.tensor([_signed(p) for p in positions], dtype=torch.long, device=made)  # (positions,)
    state = _mix(base + place * _signed(_GOLDEN))  # (positions,)
    step = torch.arange(1, vocab + 1, dtype=torch.long, device=made) * _signed(_GOLDEN)  # (vocab,)
    bits = _shifted(_mix(state.unsqueeze(-1) + step), 12)  # (positions, vocab), 52 uniform bits
    # Half a unit above the grid of 52 bits: neither 0 nor, after rounding, 1.
    uniform = (bits.double() + 0.5) * 2.0**-52
    return (-(-uniform.log()).log().float()).to(device)


def sample(logits: Tensor, noise: Tensor) -> Tensor:
    """A draw from ``softmax(logits)`` by the Gumbel-max trick (Gumbel, "Statistical Theory of Extreme Values", 1954;
    Maddison, Tarlow and Minka, "A* Sampling", 2014, section 2): ``argmax(logits + noise)``.

    Args:
        logits: ``(n, vocab)``, divided by the temperature; ``-inf`` bans a token.
        noise: ``(n, vocab)``, standard Gumbel noise.

    Returns:
        int64 ``(n,)``, token ids.
    """
    # bfloat16 sums would tie and favour low ids; adding float32 noise promotes them.
    return (logits + noise).argmax(dim=-1)


def reject(target: Tensor, draft: Tensor, tokens: Tensor, uniform: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Exact rejection of drafted tokens with the residual distribution (Leviathan et al., 2023, theorem 1 and appendix
    A.1; Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", 2023, algorithm 2).

    A token that was drawn from ``draft`` is accepted with probability ``min(1, target / draft)``; else another one is
    drawn from the normalised ``max(target - draft, 0)``. What comes out follows ``target``, if ``draft`` is what the
    token was drawn from.

    Args:
        target, draft: probabilities ``(n, vocab)``.
        tokens: int64 ``(n,)``, drafted tokens.
        uniform: ``(n,)``, uniform on (0, 1). noise: ``(n, vocab)``, standard Gumbel noise; both independent of
            whatever drew ``tokens``.

    Returns:
        int64 ``(n,)``: the token at each position if all drafted ones before it are accepted; bool ``(n,)``, True: the
        drafted one.
    """
    index = tokens.unsqueeze(-1)  # (n, 1)
    p, q = target.gather(-1, index).squeeze(-1), draft.gather(-1, index).squeeze(-1)  # (n,)
    accepted = uniform * q < p  # (n,), True: accepted
    left = (target - draft).clamp(min=0)  # (n, vocab)
    # Equal distributions never reject, but for rounding: then any draw from the target will do.
    left = torch.where(left.sum(dim=-1, keepdim=True) > 0, left, target)
    redrawn = sample(left.log(), noise)  # (n,)
    return torch.where(accepted, tokens, redrawn), accepted


def keyed_uniform(seed: int | Sequence[int], positions: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Numbers in (0, 1), float32 ``(positions,)``, a pure function of seed and position, as in ``keyed_noise``."""
    return torch.exp(-torch.exp(-keyed_noise(seed, positions, 1, device)[:, 0]))


def _mix(z: Tensor) -> Tensor:
    """The output function of SplitMix64 on int64 words (David Stafford's 13th variant of the MurmurHash3 finaliser)."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own shift of int64 copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of ``word`` modulo 2^64."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word
