"""The file of a speculative run: JSON lines, appended after every prompt, from which an interrupted run goes on.

The first line says what is measured. A line that an interrupt cut in two is taken off; a file of other settings is
refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Key = tuple[Any, ...]

MAX_BYTES = 2**30
"""Longest journal that is read; a full run writes a few megabytes."""


class JournalError(ValueError):
    """A file that is no journal, or one of a run with other settings; the message says how they differ."""


def key_of(line: Line) -> Key:
    """What a line is about; a later line with the same key replaces it."""
    return tuple(line.get(name) for name in ("kind", "repeat", "category", "prompt", "second"))


class Journal:
    """An open journal; ``lines`` holds what is in it, by key."""

    def __init__(self, path: Path, settings: Line) -> None:
        """Open or begin a journal.

        Args:
            path: of the file; its folder exists. settings: what is measured, as plain JSON values.

        Raises:
            JournalError: the file is something else, or was begun with other settings. OSError: it cannot be written.
        """
        self.path = path
        self.lines: dict[Key, Line] = {}
        begun = _whole_lines(path)
        if begun:
            self._check(begun[0], settings)
            self.lines = {key_of(line): line for line in begun[1:]}
        else:
            self._write({"kind": "settings", **settings})

    def append(self, line: Line) -> None:
        """Add a line; it is on disk when this returns."""
        self._write(line)
        self.lines[key_of(line)] = line

    def get(self, **key: Any) -> Line | None:
        """The line about that, None when it was not measured yet."""
        return self.lines.get(key_of(key))

    def of_kind(self, kind: str) -> list[Line]:
        """All lines of a kind, in the order in which they were first written."""
        return [line for line in self.lines.values() if line["kind"] == kind]

    def _write(self, line: Line) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _check(self, first: Line, settings: Line) -> None:
        if first.get("kind") != "settings":
            raise JournalError(f"{self.path} is no file of answers of this bench; name another one, or delete it")
        stored = {name: value for name, value in first.items() if name != "kind"}
        wanted = json.loads(json.dumps(settings))
        differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        if differing:
            shown = "; ".join(f"{name}: {stored.get(name)} there, {wanted.get(name)} now" for name in differing)
            raise JournalError(f"{self.path} was begun with other settings ({shown}); name another file, or delete it")


def _whole_lines(path: Path) -> list[Line]:
    """The lines of a file; one without an end is cut off, in the file too."""
    if not path.exists():
        return []
    if path.stat().st_size > MAX_BYTES:
        raise JournalError(f"{path} holds more than {MAX_BYTES} bytes; name another file")
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines: list[Line] = []
    for number, raw in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(raw)
        except ValueError as error:
            raise JournalError(f"{path}, line {number}, is not JSON; name another file, or delete it") from error
        if not isinstance(line, dict) or "kind" not in line:
            raise JournalError(f"{path}, line {number}, is no line of this bench; name another file, or delete it")
        lines.append(line)
    if lines and len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return lines
