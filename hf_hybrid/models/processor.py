"""What the processor can do."""

from __future__ import annotations

from pathlib import Path

_UNITS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}
CPUINFO = Path("/proc/cpuinfo")


def bfloat16_units() -> list[str] | None:
    """Instructions that multiply in bfloat16; without any it is slower than float32. None: the system does not say."""
    try:
        flags = set(CPUINFO.read_text(encoding="utf-8").split())
    except OSError:
        return None
    return sorted(flags & _UNITS)
