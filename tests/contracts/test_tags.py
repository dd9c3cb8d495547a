"""No module but a grammar names a tag of plans.

Catches: a tag that is read, compared or spelled outside `hf_hybrid.core.grammars`, after which a second grammar would
need changes there too.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRAMMARS = "hf_hybrid/core/grammars/"
"""Where tags live."""
VOCABULARY = {"hf_hybrid/models/vocabulary.py", "hf_hybrid/training/recipes/tokenizer.py"}
"""They put the native tags into a vocabulary: they may name that grammar, and not its tags."""
TAGS = {"par", "topic", "async_", "sync", "spad"}
SPELLED = re.compile(r"</?(?:par|topic|async|sync|spad)/?>|<(?:len|dep):")


def modules() -> list[str]:
    paths = [*(ROOT / "hf_hybrid").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    return [name for name in names if not name.startswith(GRAMMARS)]


def tags_in(source: str, native: bool = False) -> list[str]:
    """What names a tag: texts and comments that spell one, attributes, arguments and names of fields; unless
    ``native``, also the native grammar itself."""
    found = SPELLED.findall(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            of_tags = getattr(node.value, "attr", getattr(node.value, "id", "")) == "tags"
            found += [node.attr] if node.attr in TAGS or (of_tags and node.attr != "ids") else []
        elif isinstance(node, ast.keyword):
            found += [node.arg] if node.arg in TAGS else []
        elif isinstance(node, ast.ImportFrom) and not native:
            names = {alias.name for alias in node.names} & {"NativeGrammar", "PlanTags"}
            found += [node.module or ""] if names or (node.module or "").endswith("grammars.native") else []
    return found


@pytest.mark.parametrize("module", modules())
def test_no_tag_is_named_outside_a_grammar(module: str) -> None:
    assert not tags_in((ROOT / module).read_text(encoding="utf-8"), native=module in VOCABULARY)


@pytest.mark.parametrize(
    "source",
    [
        "if token == control.tags.topic: pass",
        "end = self.control.spad",
        "known = max(control.tags.lengths)",
        "tags.depends.index(token)",
        "make(par=3)",
        '"""A part ends with <spad>."""',
        "x = f'<len:{n}>'  # a length",
        "from hf_hybrid.core.grammars.native import anything",
        "from hf_hybrid.core.grammars import NativeGrammar",
    ],
)
def test_what_names_a_tag_is_found(source: str) -> None:
    assert tags_in(source)


def test_asking_whether_there_are_tags_is_no_naming() -> None:
    assert not tags_in("plans = control.tags is not None and span.depends and grammar.lengths and control.tags.ids")
    assert not tags_in("from hf_hybrid.core.grammars.native import NativeGrammar", native=True)
