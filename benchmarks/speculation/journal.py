"""The journal of a speculative run: JSON lines, appended after every prompt, from which an interrupted run goes on.

The first record holds the settings; a file with other settings is refused. A line that an interrupt cut in two is
removed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Key = tuple[Any, ...]

MAX_BYTES = 2**30
"""Longest journal that is read; a full run writes a few megabytes."""


class JournalError(ValueError):
    """A file that is no journal, or one of a run with other settings; the message says how they differ."""


def key_of(record: Record) -> Key:
    """What a record is about; a later record with the same key replaces it."""
    return tuple(record.get(name) for name in ("kind", "repeat", "category", "prompt", "second"))


class Journal:
    """An open journal; ``records`` holds its content, by key."""

    def __init__(self, path: Path, settings: Record) -> None:
        """Open or begin a journal.

        Args:
            path: of the file; its folder exists. settings: what is measured, as plain JSON values.

        Raises:
            JournalError: the file is something else, or was begun with other settings. OSError: it cannot be written.
        """
        self.path = path
        self.records: dict[Key, Record] = {}
        begun = _whole_records(path)
        if begun:
            self._check(begun[0], settings)
            self.records = {key_of(record): record for record in begun[1:]}
        else:
            self._write({"kind": "settings", **settings})

    def append(self, record: Record) -> None:
        """Add a record; it is on disk when this returns."""
        self._write(record)
        self.records[key_of(record)] = record

    def get(self, **key: Any) -> Record | None:
        """The record with that key; None: it was not measured yet."""
        return self.records.get(key_of(key))

    def of_kind(self, kind: str) -> list[Record]:
        """All records of a kind, in the order in which they were first written."""
        return [record for record in self.records.values() if record["kind"] == kind]

    def _write(self, record: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _check(self, first: Record, settings: Record) -> None:
        if first.get("kind") != "settings":
            raise JournalError(f"{self.path} is no file of answers of this bench; name another one, or delete it")
        stored = {name: value for name, value in first.items() if name != "kind"}
        wanted = json.loads(json.dumps(settings))
        differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        if differing:
            shown = "; ".join(f"{name}: {stored.get(name)} there, {wanted.get(name)} now" for name in differing)
            raise JournalError(f"{self.path} was begun with other settings ({shown}); name another file, or delete it")


def _whole_records(path: Path) -> list[Record]:
    """Read the records of a file; a last line without an end is cut off, in the file too."""
    if not path.exists():
        return []
    if path.stat().st_size > MAX_BYTES:
        raise JournalError(f"{path} holds more than {MAX_BYTES} bytes; name another file")
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    records: list[Record] = []
    for number, raw in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(raw)
        except ValueError as error:
            raise JournalError(f"{path}, line {number}, is not JSON; name another file, or delete it") from error
        if not isinstance(record, dict) or "kind" not in record:
            raise JournalError(f"{path}, line {number}, is no line of this bench; name another file, or delete it")
        records.append(record)
    if records and len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return records
