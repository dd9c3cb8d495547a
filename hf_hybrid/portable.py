"""Writes ``custom_generate/``: this package's decoding as flat files, for repositories that run without the package.

transformers (``dynamic_module_utils``) runs ``custom_generate/generate.py`` of a repository that the user trusts. It
copies the siblings that are imported as ``from .name import ...``, follows neither folders nor ``from . import name``,
and asks for every package that is imported outside of ``try``. So each module that the entry reaches becomes one file
(``hf_hybrid.core.rows`` is ``core_rows.py``), and only its import lines are changed: one line stays one line.

The sources are read as text; nothing of them is imported here.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType

FOLDER = "custom_generate"
ENTRY_FILE = "generate.py"
REQUIREMENTS = ("numpy", "torch>=2.6", "transformers>=5.15", "transformers<6")
"""What the copy needs, one clause a line: transformers checks (and never installs) them when it loads the folder."""

_PACKAGE = "hf_hybrid"
_ENTRY = "hf_hybrid.hub.custom_generate"
_MARK = "HF_HYBRID = True"
_UNNAMED = "STRATEGY: str | None = None"
_HEADER = "# Copied from hf_hybrid "


class PortableError(ValueError):
    """A folder that cannot be written, or a source that cannot be copied; the message says what to change."""


@cache
def custom_generate_files(strategy: str | None = None) -> Mapping[str, str]:
    """File name -> text for all of ``custom_generate/``; the same for the same package, in a fixed order.

    Args:
        strategy: of calls that name none; None: what the model's ``generation_config.hf_hybrid`` names.

    Raises:
        PortableError: a module of the package imports in a way that the host would not follow.
    """
    texts: dict[str, str] = {}
    origins: dict[str, str] = {}
    waiting = [_ENTRY]
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if origins.setdefault(name, module) != module:
            raise PortableError(f"{module} and {origins[name]} would both be {name}; rename one")
        if name in texts:
            continue
        text, needed = _flattened(module)
        texts[name] = f"{_HEADER}{_version()}: {module}\n# SPDX-License-Identifier: Apache-2.0\n{text}"
        waiting += needed
    if strategy is not None:
        if texts[ENTRY_FILE].count(_UNNAMED) != 1 or not strategy.isidentifier():
            raise PortableError(f"strategy={strategy!r} is no name of a strategy")
        texts[ENTRY_FILE] = texts[ENTRY_FILE].replace(_UNNAMED, f'STRATEGY: str | None = "{strategy}"')
    entry = {ENTRY_FILE: texts.pop(ENTRY_FILE)}  # written last: it makes the folder count
    requirements = {"requirements.txt": "".join(f"{line}\n" for line in REQUIREMENTS)}
    return MappingProxyType(requirements | dict(sorted(texts.items())) | entry)


def write_custom_generate(folder: str | os.PathLike[str], strategy: str | None = None) -> Path:
    """Write ``custom_generate/`` into ``folder``, replacing an older one, and return its path.

    Files that this package did not write stay. Nothing is written through a link, such as those of a Hub cache.

    Raises:
        PortableError: there is a ``custom_generate/generate.py`` that is not hf_hybrid's, or a file or link of that
            name.
    """
    target = Path(folder) / FOLDER
    entry = target / ENTRY_FILE
    if target.is_symlink():
        raise PortableError(f"{target} is a link to {os.readlink(target)}; remove it, or save into another folder")
    if target.exists() and not target.is_dir():
        raise PortableError(f"{target} is a file; remove it, or save into another folder")
    if entry.is_file() and _MARK not in entry.read_text(encoding="utf-8", errors="replace").splitlines():
        raise PortableError(f"{entry} is not hf_hybrid's; remove {target}, or save into another folder")
    texts = custom_generate_files(strategy)
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.py"):
        if old.name not in texts and old.read_text(encoding="utf-8", errors="replace").startswith(_HEADER):
            old.unlink()
    for name, text in texts.items():
        fresh = target / f".{name}.{os.getpid()}"
        fresh.unlink(missing_ok=True)
        try:
            with fresh.open("x", encoding="utf-8", newline="\n") as file:  # x: never through a link of that name
                file.write(text)
            fresh.replace(target / name)
        finally:
            fresh.unlink(missing_ok=True)
    return target


def flat_name(module: str) -> str:
    """The name of a module of the package in the folder: ``hf_hybrid.core.rows`` is ``core_rows``."""
    return "generate" if module == _ENTRY else module.removeprefix(f"{_PACKAGE}.").replace(".", "_")


def source_of(module: str) -> str:
    """The text of a module of the package.

    Raises:
        PortableError: there is none.
    """
    if module not in _sources():
        raise PortableError(f"the source of {module} is missing from this installation; install the wheel")
    return _sources()[module].read_text(encoding="utf-8")


@cache
def _sources() -> Mapping[str, Traversable]:
    """Module -> its file, for the whole package."""
    found: dict[str, Traversable] = {}
    waiting = [(_PACKAGE, files(_PACKAGE))]
    while waiting:
        name, folder = waiting.pop()
        for item in folder.iterdir():
            if item.is_dir():
                waiting.append((f"{name}.{item.name}", item))
            elif item.name.endswith(".py"):
                found[name if item.name == "__init__.py" else f"{name}.{item.name[:-3]}"] = item
    return found


def _flattened(module: str) -> tuple[str, list[str]]:
    """The text of a module with its imports turned into siblings, and the modules that it imports."""
    source = source_of(module)
    lines = source.splitlines(keepends=True)
    needed: list[str] = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(_is_own(alias.name) for alias in node.names):
            raise PortableError(f"{module}, line {node.lineno}: write `from {_PACKAGE}.module import name`")
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level or node.module is None or node.module == _PACKAGE:
            raise PortableError(f"{module}, line {node.lineno}: name the module whole, `from {_PACKAGE}.module import`")
        if _is_own(node.module):
            if any(f"{node.module}.{alias.name}" in _sources() for alias in node.names):
                raise PortableError(f"{module}, line {node.lineno}: import names, not modules")
            line = lines[node.lineno - 1]
            changed = line.replace(f"from {node.module} import", f"from .{flat_name(node.module)} import", 1)
            if changed == line:
                raise PortableError(f"{module}, line {node.lineno}: write `from ... import` on one line")
            lines[node.lineno - 1] = changed
            needed.append(node.module)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            _drop_foreign(node, lines)
    return "".join(lines), needed


def _drop_foreign(block: ast.If, lines: list[str]) -> None:
    """Empty imports of other packages that are for type checkers alone: the host would ask for these packages."""
    for node in block.body:
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", ())]
        if names and not any(_is_own(name or "") for name in names):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = "\n"
            lines[node.lineno - 1] = f"{' ' * node.col_offset}pass\n"


def _is_own(name: str) -> bool:
    return name == _PACKAGE or name.startswith(f"{_PACKAGE}.")


def _version() -> str:
    """Version of the package, read from its text: this low layer must not import the package."""
    for node in ast.parse(source_of(_PACKAGE)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__version__":
            return str(ast.literal_eval(node.value))
    raise PortableError("hf_hybrid/__init__.py has no __version__")
