"""The README tells the truth: its table is the measured one, its Python runs.

Catches: numbers that were measured with other code than the ones published, and snippets that rot.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_hybrid import uninstall
from hf_hybrid.hub.tables import BEGIN, END, read_results, render_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "model_cards" / "results" / "hybrid-pocket.json"


def test_the_table_is_the_measured_one() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == render_table(read_results(RESULTS)).strip()


def test_the_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 4
    scope: dict[str, object] = {}
    try:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), scope)
    finally:
        uninstall()
    shown = capsys.readouterr().out
    assert "## " in shown and "Port Amel" in shown
