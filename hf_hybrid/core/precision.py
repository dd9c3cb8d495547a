"""Where numbers of double precision are made: Apple's GPUs, and some others, have none."""

from __future__ import annotations

from functools import cache

import torch


def double_device(device: torch.device | str) -> torch.device:
    """``device`` if it has float64, else the CPU, whose results are then moved there in float32."""
    device = torch.device(device)
    return device if has_double(device) else torch.device("cpu")


@cache
def has_double(device: torch.device) -> bool:
    """True: ``device`` computes in float64. Tried once: a name would not tell (Apple's MPS refuses to store one, some
    others to compute with it)."""
    try:
        torch.ones((), dtype=torch.float64, device=device).log()
    except (TypeError, RuntimeError):
        return False
    return True
