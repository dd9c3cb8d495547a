"""Every script in examples/ runs and writes what it promises.

Catches: examples that rot when a name or a default changes.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    shown = capsys.readouterr().out
    assert "## Geography" in shown and "## People" in shown


def test_there_are_examples() -> None:
    assert SCRIPTS == ["own_drafter.py", "own_plan.py", "plan_and_fill.py", "stream.py"]
