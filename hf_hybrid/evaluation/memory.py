"""Measures peak memory of a call.

On Linux the high-water mark of the resident set (``VmHWM``) is reset before every call through
``/proc/self/clear_refs`` and read after it; it holds weights, libraries and whatever the allocator kept from earlier
calls, so differences between candidates are lower bounds. On a CUDA device it is torch's peak of allocated memory
instead. Elsewhere no such peak can be read (that of ``getrusage`` never decreases), and the value is None.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_ROLLUP = Path("/proc/self/smaps_rollup")


def reset_peak(device: torch.device) -> None:
    """Forget the peak of earlier calls."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or forbidden: peak_mb finds out
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size


def peak_mb(device: torch.device) -> float | None:
    """Peak memory since ``reset_peak``, in 2**20 bytes; see the module."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        with _CLEAR_REFS.open("w"):  # not writable: the mark was never reset and would only rise
            pass
        marks = [line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    except OSError:
        return None
    return int(marks[0]) / 1024 if marks else None


def resident_mb() -> float | None:
    """Resident memory, in 2**20 bytes, counted page by page (``VmRSS`` may lag behind); None: cannot be read."""
    try:
        lines = [line.split()[1] for line in _ROLLUP.read_text().splitlines() if line.startswith("Rss:")]
    except OSError:
        return None
    return int(lines[0]) / 1024 if lines else None
