"""The page on safety and on other packages tells the truth: its first snippet runs, its versions are the tested ones.

Catches: a snippet that rots, a version that is not the one that was run, a number of attacks or files that changed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from attacks import ATTACKS
from hostile_configs import hostile_configs

from tests.snippets import snippets

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")


def test_the_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    block = snippets(PAGE)[0]
    exec(compile(block, "integrations.md", "exec"), {})
    shown = capsys.readouterr().out
    assert shown.startswith("['<|user|>'") and shown.endswith("'<|assistant|>']\n") and shown.count("<|") == 2


def test_the_numbers_are_those_of_the_tests() -> None:
    assert f"{len(ATTACKS)} attacks" in PAGE and f"{len(hostile_configs())} generated files" in PAGE


def test_the_versions_are_those_of_the_tests() -> None:
    pinned = "".join((ROOT / file).read_text() for file in ("constraints.txt", "constraints-integration.txt"))
    rows = re.findall(r"^\| (peft|trl|accelerate|lm-eval|openai) \| ([\d.]+) \|", PAGE, re.M)
    assert len(rows) == 5 and all(f"{name}=={version}\n" in pinned for name, version in rows)
