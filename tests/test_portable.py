"""``custom_generate/`` is the package's own code: every file equals its source, and the host can follow every import.

Bugs these tests catch: a copy that was edited, or that drifts from its source; a sibling that transformers would not
copy; a package that it would ask for; an import that is rewritten wrongly or not at all; another build on another day;
a foreign generate.py that is overwritten; a file of a Hub cache that is changed through a link.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from hf_hybrid import PortableError, portable
from hf_hybrid.portable import custom_generate_files, flat_name, write_custom_generate

ROOT = Path(__file__).parents[1]
TYPING_ONLY = ("from _typeshed import DataclassInstance", "pass")


def modules() -> dict[str, Path]:
    """Flat file name -> source file, for the whole package, without asking the builder where sources lie."""
    found = {}
    for path in (ROOT / "hf_hybrid").rglob("*.py"):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found["_".join(parts[1:]) + ".py"] = path
    found["generate.py"] = found.pop("hub_custom_generate.py")
    return found


def test_every_file_is_its_source_up_to_import_lines() -> None:
    sources = modules()
    for name, text in custom_generate_files().items():
        if name == "requirements.txt":
            continue
        head, licence, *copy = text.split("\n")
        source = sources[name].read_text(encoding="utf-8").split("\n")
        module = ".".join(sources[name].relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert head.endswith(f": {module}") and licence == "# SPDX-License-Identifier: Apache-2.0"
        assert len(copy) == len(source), name
        for before, after in zip(source, copy, strict=True):
            if before == after:
                continue
            if (before.strip(), after.strip()) == TYPING_ONLY:
                continue
            own = re.fullmatch(r"(\s*from )hf_hybrid\.(\S+)( import .*)", before)
            assert own is not None, (name, before, after)
            assert after == f"{own[1]}.{own[2].replace('.', '_')}{own[3]}", name


def test_what_is_left_out_is_not_decoding() -> None:
    names = set(custom_generate_files())
    assert {"generate.py", "routing.py", "config.py", "core_rows.py", "models_runner.py", "decoding.py"} <= names
    out = (
        "cli",
        "training",
        "evaluation",
        "hub",
        "weights",
        "checkpoints",
        "mixin",
        "many",
        "portable",
        "core_noising",
    )
    assert not [name for name in names if name.startswith(out)]
    assert sum(map(len, custom_generate_files().values())) < 560_000


def test_imports_stay_inside_and_ask_for_what_requirements_name() -> None:
    files = custom_generate_files()
    packages = {re.split("[<>=]", line)[0] for line in files["requirements.txt"].split()}
    reached = {"generate"}
    for name, text in files.items():
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in files, (name, node.lineno)
                reached.add(str(node.module))
            elif isinstance(node, ast.ImportFrom | ast.Import):
                roots = {
                    (m or "").split(".")[0]
                    for m in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
                }
                assert roots <= packages | sys.stdlib_module_names, (name, node.lineno, roots)
                assert not roots & {"pickle", "marshal", "shelve", "socket", "urllib", "http", "subprocess", "ctypes"}
    assert {f"{name}.py" for name in reached} | {"requirements.txt"} == set(files)


def test_the_host_finds_every_sibling(tmp_path: Path) -> None:
    folder = write_custom_generate(tmp_path)
    found = {Path(path).name for path in get_relative_import_files(folder / "generate.py")}
    assert found | {"generate.py", "requirements.txt"} == {path.name for path in folder.iterdir()}
    for path in folder.glob("*.py"):
        check_imports(path)  # what it does to every file of a repository on the Hub


def test_requirements_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    clauses = set()
    for line in project["dependencies"]:
        first, *rest = line.split(",")
        name = re.split("[<>=]", first)[0]
        if name in ("numpy", "torch", "transformers"):
            clauses |= {first, *(f"{name}{clause}" for clause in rest)}
    assert set(portable.REQUIREMENTS) == clauses


def test_one_package_one_folder() -> None:
    first, again = custom_generate_files(), custom_generate_files.__wrapped__()
    assert first is not again and list(first.items()) == list(again.items())
    assert list(first)[-1] == "generate.py"


def test_the_strategy_of_calls_that_name_none() -> None:
    plain, named = custom_generate_files(), custom_generate_files("speculative")
    assert [name for name in plain if plain[name] != named[name]] == ["generate.py"]
    scope: dict[str, Any] = {}
    exec(compile(named["generate.py"], "generate.py", "exec"), scope)
    assert scope["STRATEGY"] == "speculative" and scope["HF_HYBRID"] is True
    with pytest.raises(PortableError, match="no name of a strategy"):
        custom_generate_files('x"; import os')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import hf_hybrid.core.rows", "write `from hf_hybrid.module import name`"),
        ("from hf_hybrid import Plan", "name the module whole"),
        ("from . import rows", "name the module whole"),
        ("from hf_hybrid.core import rows", "import names, not modules"),
        ("from hf_hybrid.core.rows \\\n    import Rows", "on one line"),
        ("from hf_hybrid.core.gone import Rows", "hf_hybrid.core.gone is missing"),
    ],
)
def test_an_import_that_the_host_would_lose_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    (tmp_path / "new.py").write_text(f'"""Doc."""\n\n{line}\n')
    sources = {**portable._sources(), "hf_hybrid.hub.custom_generate": tmp_path / "new.py"}
    monkeypatch.setattr(portable, "_sources", lambda: sources)
    with pytest.raises(PortableError, match=message):
        custom_generate_files.__wrapped__()


def test_two_modules_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new.py").write_text("from hf_hybrid.core.rows import a\nfrom hf_hybrid.core_rows import b\n")
    (tmp_path / "rows.py").write_text("b = 1\n")
    own = {"hf_hybrid.hub.custom_generate": tmp_path / "new.py", "hf_hybrid.core_rows": tmp_path / "rows.py"}
    sources = {**portable._sources(), **own}
    monkeypatch.setattr(portable, "_sources", lambda: sources)
    with pytest.raises(PortableError, match="would both be core_rows"):
        custom_generate_files.__wrapped__()
    assert flat_name("hf_hybrid.core.rows") == flat_name("hf_hybrid.core_rows")


def test_writing_again_replaces_what_is_ours_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = write_custom_generate(tmp_path, "speculative")
    (folder / "old_module.py").write_text("# Copied from hf_hybrid 0.0.1: hf_hybrid.old.module\n")
    (folder / "notes.py").write_text("# a user's\n")
    (folder / "core_rows.py").write_text("# Copied from hf_hybrid 0.0.1: hf_hybrid.core.rows\n")
    assert write_custom_generate(str(tmp_path)) == folder
    written = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert written == {**custom_generate_files(), "notes.py": "# a user's\n"}


def test_a_foreign_generate_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("def generate(model): ...\n")
    with pytest.raises(PortableError, match="not hf_hybrid's"):
        write_custom_generate(tmp_path)
    assert [path.name for path in (tmp_path / "custom_generate").iterdir()] == ["generate.py"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "custom_generate").write_text("notes")
    with pytest.raises(PortableError, match="is a file"):
        write_custom_generate(tmp_path / "other")


def test_nothing_is_written_through_links(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("HF_HYBRID = True\n")
    folder = tmp_path / "snapshot" / "custom_generate"
    folder.mkdir(parents=True)
    (folder / "generate.py").symlink_to(blob)
    write_custom_generate(tmp_path / "snapshot")
    assert blob.read_text() == "HF_HYBRID = True\n" and not (folder / "generate.py").is_symlink()
