"""The package holds no bench of other packages and no data but the bundled checkpoint: the wheel is made from it.

Catches: a module that drives or names a package that it is compared with, a reader of somebody's weights, and files of
data beside the checkpoint, which every user would download. The wheel itself is looked at by ``.ci/wheel_is_whole.py``.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
foreign = runpy.run_path(str(ROOT / ".ci" / "wheel_is_whole.py"))["foreign"]


def test_the_package_holds_its_modules_and_the_checkpoint_alone() -> None:
    assert foreign(ROOT / "hf_hybrid") == []


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("evaluation/peers.py", "from flashspec import SpeculativeEngine", "it knows flashspec"),
        ("weights/reader.py", "import gguf", "it knows gguf"),
        ("checkpoints/other/test_set.jsonl", "{}", "data, and not of the checkpoint"),
        ("training/recipes/records.json", "{}", "data, and not of the checkpoint"),
    ],
)
def test_what_does_not_belong_there_is_found(name: str, content: str, why: str, tmp_path: Path) -> None:
    for file, text in (
        ("py.typed", ""),
        ("hub/card.md", ""),
        ("checkpoints/hybrid-pocket/x", ""),
        ("a.py", ""),
        (name, content),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert foreign(tmp_path) == [f"{name} ({why})"]
