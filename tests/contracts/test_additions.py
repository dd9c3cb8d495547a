"""What a new strategy, grammar, drafter or Runner touches: three files, two, two and one, as CONTRIBUTING says.

Each is added to a copy of the package and used there. Catches: a fact about one of them that is decided by its name
somewhere else, a list beside the tables, and a lane that grew back into a home of everything.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from hf_hybrid.core.lane import Lane

ROOT = Path(__file__).resolve().parents[2]
NEW = ""
"""Instead of the text that an edit looks for: the file is new."""

WRITER = '''"""Plain writing that never uses the mother of all tokens."""

from hf_hybrid.core.lane import Lane
from hf_hybrid.decoding.writer import Shared, Writer


class Never(Shared):
    def __init__(self, ids):
        self.ids = ids


class Abstaining(Writer):
    @classmethod
    def share(cls, context, settings):
        return Never((settings.never,))

    def take_over(self, trunk: Lane) -> None:
        return

    def settled(self, lane, tokens):
        self.canvas.finished = lane.done

    def stage(self):
        return "text"

    def forbidden(self, lane):
        return self.shared.ids
'''
SETTINGS = '''

@dataclass(frozen=True, kw_only=True)
class AbstainingSettings(Settings):
    """Plain writing without one token."""

    one_text: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True
    never: int = setting(0, "the id that is never written", 0, 1 << 30)


SETTINGS: dict'''
DRAFTER = '''"""Drafts one token, for ever."""

from hf_hybrid.decoding.drafters.drafter import Draft, Drafter


class StubbornDrafter(Drafter):
    name = "stubborn"

    def __init__(self, token):
        self.token = token

    def propose(self, texts, length, sampler):
        return [Draft([self.token] * length) for _ in texts]
'''

ADDED: dict[str, dict[str, list[tuple[str, str]]]] = {
    "strategy": {
        "decoding/writers/abstaining.py": [(NEW, WRITER)],
        "decoding/writers/__init__.py": [
            (
                "from hf_hybrid.decoding.writers.autoregressive",
                "from hf_hybrid.decoding.writers.abstaining import Abstaining\n"
                "from hf_hybrid.decoding.writers.autoregressive",
            ),
            ('    "autoregressive": Auto', '    "abstaining": Abstaining,\n    "autoregressive": Auto'),
        ],
        "config.py": [
            ("\n\nSETTINGS: dict", SETTINGS),
            ('    "autoregressive": Auto', '    "abstaining": AbstainingSettings,\n    "autoregressive": Auto'),
        ],
    },
    "grammar": {
        "core/grammars/other.py": [(NEW, "<native>")],
        "core/grammars/__init__.py": [
            (
                "from hf_hybrid.core.plan import",
                "from hf_hybrid.core.grammars.other import OtherGrammar\nfrom hf_hybrid.core.plan import",
            ),
            ('    "native": NativeGrammar,\n', '    "native": NativeGrammar,\n    "other": OtherGrammar,\n'),
        ],
    },
    "drafter": {
        "decoding/drafters/stubborn.py": [(NEW, DRAFTER)],
        "decoding/__init__.py": [
            (
                "from hf_hybrid.decoding.drafters.suffix",
                "from hf_hybrid.decoding.drafters.stubborn import StubbornDrafter as StubbornDrafter\n"
                "from hf_hybrid.decoding.drafters.suffix",
            )
        ],
    },
    "runner": {"models/counting.py": [(NEW, "<replay>")]},
}
"""What is added -> file -> (text that is there, its replacement)."""

USED = """
import torch
import hf_hybrid
from hf_hybrid import Plan, Span
from hf_hybrid.decoding import StubbornDrafter
from hf_hybrid.models.counting import CountingRunner
from tests.models_for_tests import CONTROL, hybrid

assert "PLACE" in hf_hybrid.__file__, hf_hybrid.__file__
model, ids = hybrid(seed=26), torch.tensor([[3, 7, 9, 2, 11]])
options = {"max_new_tokens": 20, "do_sample": False}
plain = model.generate(ids, strategy="autoregressive", **options)
banned = int(plain[0, 6])
wanted = model.generate(ids, strategy="autoregressive", suppress_tokens=[banned], **options)
found = model.generate(ids, strategy="abstaining", never=banned, **options, return_dict_in_generate=True)
assert torch.equal(found.sequences, wanted) and found.report[0].strategy == "abstaining"
stubborn = {"strategy": "speculative", "drafter": StubbornDrafter(banned), "adaptive": False}
found = model.generate(ids, **stubborn, **options, return_dict_in_generate=True)
assert torch.equal(found.sequences, plain) and found.report[0].drafting.drafter == "stubborn"
replayed = model.generate(ids, strategy="speculative", runner=CountingRunner, **options)
assert torch.equal(replayed, plain) and CountingRunner.passes > 5
plan = Plan((Span((5,), 4), Span((6, 8), 6, (0,))))
native = model.generate(ids, strategy="planned_diffusion", plan=plan, return_control_tokens=True, **options)
model.config.hf_hybrid["grammar"] = "other"
other = model.generate(ids, strategy="planned_diffusion", plan=plan, return_control_tokens=True, **options)
assert type(hf_hybrid.grammar_of(hf_hybrid.control_tokens(model))).__name__ == "OtherGrammar"
topic = CONTROL.tags.topic
assert topic in native[0].tolist() and not torch.equal(native, other), "its plan ends with a mark of its own"
"""


def edited(copy_of: Path, path: str, edits: list[tuple[str, str]]) -> None:
    file = copy_of / "hf_hybrid" / path
    for before, after in edits:
        if before == NEW:
            assert not file.exists()
            file.write_text(generated(after), encoding="utf-8")
            continue
        text = file.read_text(encoding="utf-8")
        assert text.count(before) == 1, (path, before)
        file.write_text(text.replace(before, after), encoding="utf-8")


def generated(text: str) -> str:
    """The native grammar whose entries say length first, and a Runner without a cache that counts its passes."""
    if text == "<native>":
        source = (ROOT / "hf_hybrid/core/grammars/native.py").read_text(encoding="utf-8")
        return source.replace("class NativeGrammar", "class OtherGrammar").replace(
            "return (self.tags.topic, *span.label,", "return (self.tags.topic, self.tags.topic, *span.label,"
        )
    if text == "<replay>":
        source = (ROOT / "hf_hybrid/models/replay.py").read_text(encoding="utf-8")
        source = source.replace("class ReplayRunner(Runner):", "class CountingRunner(Runner):\n    passes = 0\n")
        return source.replace(
            "        rows = self._checked(", "        type(self).passes += 1\n        rows = self._checked("
        )
    return text


def test_what_an_addition_touches(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "hf_hybrid", tmp_path / "hf_hybrid", ignore=shutil.ignore_patterns("__pycache__"))
    assert {name: len(files) for name, files in ADDED.items()} == {
        "strategy": 3,
        "grammar": 2,
        "drafter": 2,
        "runner": 1,
    }
    for files in ADDED.values():
        for path, edits in files.items():
            edited(tmp_path, path, edits)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", USED.replace("PLACE", tmp_path.name)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_lane_holds_fewer_than_fifteen_things() -> None:
    assert len(fields(Lane)) < 15


def test_the_loop_is_seen_at_a_glance() -> None:
    tree = ast.parse((ROOT / "hf_hybrid/decoding/loop.py").read_text(encoding="utf-8"))
    loop = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "advance")
    assert len(loop.body) <= 8  # its docstring and seven statements


@pytest.mark.parametrize("folder", ["hf_hybrid", "tests", "benchmarks", "examples", ".ci"])
def test_no_file_is_too_long(folder: str) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 400} == {}
