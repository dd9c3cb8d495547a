"""The Python of a page, found and run in the order of the page, as a reader would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_hybrid.checkpoints import bundled

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md"))))
"""Every page of the project, as a path from its root."""
STAND_INS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "hybrid-pocket"}
"""Models of the Hub that pages name -> the bundled checkpoint that is loaded instead."""


def read(name: str) -> str:
    """The text of a page."""
    return (ROOT / name).read_text(encoding="utf-8")


def snippets(page: str, language: str = "python") -> list[str]:
    """The Python blocks of a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.S | re.M)


def run_snippets(name: str, count: int | None = None) -> dict[str, Any]:
    """Run the Python of the page ``name`` (``count`` blocks), one after the other; what they defined."""
    blocks = snippets(read(name))
    assert blocks and count in (None, len(blocks))
    scope: dict[str, Any] = {}
    for block in blocks:
        for model, checkpoint in STAND_INS.items():
            block = block.replace(f'"{model}"', repr(str(bundled(checkpoint))))
        exec(compile(block, name, "exec"), scope)
    return scope
