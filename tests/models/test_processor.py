"""What the processor says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_hybrid.models import processor
from hf_hybrid.models.processor import bfloat16_units


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("flags\t\t: fpu avx512_bf16 amx_bf16 avx512f\n", ["amx_bf16", "avx512_bf16"]),
        ("flags\t\t: fpu avx2 avx512_bf16x\n", []),
        ("Features\t: fp asimd bf16\n", ["bf16"]),
        (None, None),
    ],
)
def test_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, found: list[str] | None) -> None:
    file = tmp_path / "cpuinfo"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    monkeypatch.setattr(processor, "CPUINFO", file)
    assert bfloat16_units() == found
