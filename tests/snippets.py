"""The Python of a page, found and run in the order of the page, as a reader would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def snippets(page: str) -> list[str]:
    """The Python blocks of a Markdown text."""
    return re.findall(r"```python\n(.*?)```", page, re.S)


def run_snippets(name: str, count: int) -> dict[str, Any]:
    """Run the blocks of the file ``name``, of which there must be ``count``, one after the other; what they defined."""
    blocks = snippets((ROOT / name).read_text(encoding="utf-8"))
    assert len(blocks) == count
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), scope)
    return scope
