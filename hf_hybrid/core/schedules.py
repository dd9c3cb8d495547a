"""Noise schedules of masked diffusion: how much of a text is still unmasked at time t.

``alpha(t)`` is the probability that a token is *not* masked at time t in [0, 1]: alpha(0) = 1, alpha(1) = 0, falling.
The weight of the cross-entropy of a masked token in the continuous-time bound is ``-alpha'(t) / (1 - alpha(t))``
(Sahoo et al., "Simple and Effective Masked Diffusion Language Models", 2024, eq. 10; Shi et al., "Simplified and
Generalized Masked Diffusion", 2024, eq. 5). For the linear schedule that is 1 / t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_hybrid.core.precision import double_device


@dataclass(frozen=True)
class Schedule:
    """A schedule and its derivative, both elementwise on ``t`` in [0, 1] of any shape."""

    alpha: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]

    def loss_weight(self, t: Tensor) -> Tensor:
        """``-alpha'(t) / (1 - alpha(t))`` for t in (0, 1]; t is clamped away from 0, where the weight is infinite."""
        # float64: near t = 0 the cosine and polynomial 1 - alpha cancel to a few digits in float32.
        precise = t.to(double_device(t.device)).double().clamp(min=1e-3)
        return (-self.derivative(precise) / (1.0 - self.alpha(precise))).to(t.dtype).to(t.device)


SCHEDULES: dict[str, Schedule] = {
    "linear": Schedule(lambda t: 1.0 - t, lambda t: -torch.ones_like(t)),
    "cosine": Schedule(
        lambda t: torch.cos(0.5 * math.pi * t),
        lambda t: -0.5 * math.pi * torch.sin(0.5 * math.pi * t),
    ),
    "polynomial": Schedule(lambda t: 1.0 - t**2, lambda t: -2.0 * t),
}
"""The served schedules by name."""


def unmask_counts(num_open: Tensor, num_steps: Tensor | int, schedule: str = "linear") -> Tensor:
    """How many positions to settle in each of ``num_steps`` denoising steps, time running from 1 to 0.

    Args:
        num_open: int64 ``(lanes,)``, open positions at the start.
        num_steps: number of steps, >= 1, one for all.
        schedule: a name in ``SCHEDULES``.

    Returns:
        int64 ``(lanes, steps)``, >= 0, every row sums to its ``num_open``; remainders are spread, never piled on the
        last step.
    """
    steps = int(num_steps)
    if steps < 1:
        raise ValueError(f"num_steps={steps}: at least one denoising step is needed")
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    made = double_device(num_open.device)
    time = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device=made)  # (steps + 1,)
    settled = SCHEDULES[schedule].alpha(time)  # share settled after each step
    settled[0], settled[-1] = 0.0, 1.0
    total = torch.round(settled * num_open.to(made).unsqueeze(-1).double()).long()  # (lanes, steps + 1)
    return total.diff(dim=-1).to(num_open.device)
