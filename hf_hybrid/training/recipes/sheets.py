"""Sheets (a prompt and an answer in parts, as text), the score of a written answer, the file of held-out prompts.

Every task of a recipe makes sheets. The file of held-out prompts beside a checkpoint holds them, so that the checkpoint
can be measured without its recipe and data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SPLITS = ("dev", "test")
SUMMARY = "Summary"
"""Heading of a part whose lines name other parts: ``- Section: its first value``."""


@dataclass(frozen=True)
class SheetPart:
    """One section: its heading, its lines, and the earlier parts of its round that it needs (0-based)."""

    label: str
    text: str
    depends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sheet:
    """A prompt and its answer: texts and rounds of parts in order.

    Attributes:
        groups: what the prompt was drawn for, such as a country; prompts that share their first group are not
            independent draws. open: True: the prompt does not decide the answer, only which parts it has.
    """

    prompt: str
    pieces: tuple[str | tuple[SheetPart, ...], ...]
    groups: tuple[str, ...]
    open: bool = False

    @property
    def answer(self) -> str:
        """The plain answer."""
        return "".join(
            piece if isinstance(piece, str) else "".join(part.label + part.text for part in piece)
            for piece in self.pieces
        )

    @property
    def parts(self) -> list[SheetPart]:
        """The parts of all rounds, in order."""
        return [part for piece in self.pieces if not isinstance(piece, str) for part in piece]

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The lines that score, each with its heading ("" for a title)."""
        return [(heading, line) for _, heading, line in keyed_lines(self.answer)]


def keyed_lines(text: str) -> list[tuple[int, str, str]]:
    """(record, heading, line) of the title lines and the `- ` lines."""
    titles, heading, keyed = 0, "", []
    for line in map(str.rstrip, text.splitlines()):
        if line.startswith("## "):
            heading = line + "\n"
        elif line.startswith("# "):
            titles, heading = titles + 1, ""
            keyed.append((max(titles - 1, 0), "", line))
        elif line.startswith("- "):
            keyed.append((max(titles - 1, 0), heading, line))
    return keyed


def score_fields(sheet: Sheet, text: str) -> tuple[int, int]:
    """(right, total): how many of the answer's lines are in `text`, under their headings and in order.

    Lines are the title and `- ` lines; of an answer without any, all that are not blank; of an open sheet the labels
    of the parts, which are all that its prompt decides.
    """
    want, got = _scored(sheet, sheet.answer), _scored(sheet, text)
    longest = [0] * (len(got) + 1)  # common subsequence so far, by lines of ``got``
    for wanted in want:
        previous, longest = longest, [0]
        for column, found in enumerate(got):
            longest.append(previous[column] + 1 if wanted == found else max(previous[column + 1], longest[column]))
    return longest[-1], len(want)


def _scored(sheet: Sheet, text: str) -> list[Any]:
    if sheet.open:
        labels = {part.label for part in sheet.parts}
        found = [(start, label) for label in labels for start in _occurrences(text, label)]
        return [label for _, label in sorted(found)]
    if keyed_lines(sheet.answer):
        return keyed_lines(text)
    return [line for line in text.splitlines() if line.strip()]


def _occurrences(text: str, label: str) -> list[int]:
    """Where `label` begins in `text`, without overlaps."""
    starts: list[int] = []
    at = text.find(label) if label else -1
    while at >= 0:
        starts.append(at)
        at = text.find(label, at + len(label))
    return starts


def exact_match(sheet: Sheet, text: str) -> bool:
    """Whether `text` is the answer, but for white space around it; of an open sheet, whether it has the answer's parts
    in order, and none of them twice."""
    if sheet.open:
        return _scored(sheet, text) == _scored(sheet, sheet.answer)
    return text.strip() == sheet.answer.strip()


def contradictions(text: str) -> tuple[int, int]:
    """(disagreeing, all) of the lines of `text` that restate a fact of an earlier part of the same record.

    A fact is a field of a record (all that is under one title). `- **Field:** value` states the field, in whatever
    part; a line `- Section: value` of the summary states the first field under that section. A line is no restatement
    if no earlier part states its fact, or if it repeats one of its own part.
    """
    stated: dict[tuple[int, str], tuple[str, str]] = {}  # (record, field) -> (heading, value)
    leading: dict[tuple[int, str], str] = {}  # (record, heading) -> its first field
    disagreeing, restated = 0, 0
    for record, heading, line in keyed_lines(text):
        if heading == f"## {SUMMARY}\n":
            section, colon, value = line.removeprefix("- ").partition(": ")
            field = leading.get((record, f"## {section}\n")) if colon else None
        else:
            field, colon, value = line.removeprefix("- **").partition(":** ")
            if not line.startswith("- **") or not colon:
                continue
            leading.setdefault((record, heading), field)
        if field is None:
            continue
        first, known = stated.setdefault((record, field), (heading, value))
        if first != heading:
            restated += 1
            disagreeing += known != value
    return disagreeing, restated


@dataclass(frozen=True)
class TestItem:
    """One held-out prompt (no test class for pytest); `kind`: what the groups of its sheet are, in the plural."""

    __test__ = False
    id: str
    split: str
    sheet: Sheet
    kind: str = "countries"


def write_items(path: Path, items: Iterable[TestItem]) -> int:
    """Write held-out prompts as JSON lines; returns their number."""
    lines: list[str] = []
    for item in items:
        sheet = item.sheet
        record: dict[str, object] = {"id": item.id, "split": item.split, item.kind: sheet.groups}
        record |= {"open": True} if sheet.open else {}
        record |= {"prompt": sheet.prompt, "answer": sheet.answer, "pieces": sheet.pieces}
        lines.append(json.dumps(record, default=asdict) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def read_test_set(path: Path) -> list[TestItem]:
    """Read and check what `write_items` wrote."""
    items: list[TestItem] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(_read_item(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from error
    if len({item.id for item in items}) != len(items):
        raise ValueError(f"{path}: an id occurs twice")
    return items


def _read_item(record: dict[str, Any]) -> TestItem:
    pieces: list[str | tuple[SheetPart, ...]] = []
    for piece in record["pieces"]:
        if not isinstance(piece, str):
            piece = tuple(SheetPart(part["label"], part["text"], tuple(part["depends"])) for part in piece)
            if any(not 0 <= earlier < number for number, part in enumerate(piece) for earlier in part.depends):
                raise ValueError("a part depends on one that is not before it")
        pieces.append(piece)
    kind = "countries" if "countries" in record else "groups"
    sheet = Sheet(str(record["prompt"]), tuple(pieces), tuple(record[kind]), bool(record.get("open", False)))
    if record["split"] not in SPLITS or sheet.answer != record["answer"]:
        raise ValueError("unknown split, or pieces that do not make up the answer")
    return TestItem(str(record["id"]), str(record["split"]), sheet, kind)
