"""The forward process of masked diffusion: hide tokens, remember which."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_times(num_blocks: int, generator: torch.Generator, all_masked: float = 0.5, lowest: float = 0.1) -> Tensor:
    """Noise levels for training blocks.

    A share ``all_masked`` of the blocks gets t = 1 (every position hidden, what a fresh decoding window looks like),
    the rest t ~ U(lowest, 1), stratified over the blocks to lower the variance (Kingma et al., "Variational Diffusion
    Models", 2021, appendix I.1).

    Returns:
        float32 ``(num_blocks,)`` in [lowest, 1].
    """
    offset = torch.rand((), generator=generator)
    strata = (torch.arange(num_blocks) / max(num_blocks, 1) + offset) % 1.0
    times = lowest + (1.0 - lowest) * strata[torch.randperm(num_blocks, generator=generator)]
    full = torch.rand(num_blocks, generator=generator) < all_masked
    return torch.where(full, torch.ones(()), times)


def hide(times: Tensor, eligible: Tensor, generator: torch.Generator) -> Tensor:
    """Which positions are hidden.

    Every eligible position is hidden with probability t of its block; a block in which nothing was hidden hides one
    eligible position, so that no block is without a term in the loss.

    Args:
        times: float ``(blocks,)``, in [0, 1].
        eligible: bool ``(blocks, length)``, True: the position exists and may be hidden.

    Returns:
        bool ``(blocks, length)``, True: hidden.
    """
    draw = torch.rand(eligible.shape, generator=generator)
    hidden = (draw < times.unsqueeze(-1)) & eligible
    # The eligible position with the smallest draw is the one that any smaller t would have hidden too.
    first = draw.masked_fill(~eligible, 2.0).argmin(dim=-1, keepdim=True)
    forced = torch.zeros_like(hidden).scatter(-1, first, True) & eligible
    return torch.where(hidden.any(dim=-1, keepdim=True), hidden, forced)
