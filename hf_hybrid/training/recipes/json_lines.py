"""A user's own data: JSON lines of ``{"prompt": text, "answer": text}``, annotated with plans.

A line may also have ``"plan": [{"label": text, "depends": [part, ...]}, ...]``, which replaces the annotation: a part
begins where its label is in the answer, ``depends`` counts parts from 1. Other fields are ignored. Lines that cannot be
used are left out and reported by kind, with their numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

from hf_hybrid.fields import REQUIRED, setting
from hf_hybrid.training.examples import Example
from hf_hybrid.training.recipes.annotate import AnnotatorSettings, Piece, annotate, join_texts, split_rounds
from hf_hybrid.training.recipes.sheets import Sheet, SheetPart, TestItem

MAX_LINE_BYTES = 1_000_000
SHOWN_LINES = 5
"""Most line numbers in a report of a kind of malformed sample."""


class SampleError(ValueError):
    """A line that is no sample; the message is its kind."""


@dataclass(frozen=True, kw_only=True)
class JsonLinesData(AnnotatorSettings):
    """The ``data`` section of a recipe with ``task: jsonl``."""

    jsonl: str = setting(REQUIRED, "path of the file with one {prompt, answer} a line")
    held_out: float = setting(0.05, "share of the prompts kept for development and test, half each", 0.0, 0.5)
    vocab_size: int = setting(4096, "tokens of the tokenizer that is trained on the file", 512, 65536)
    open_answers: bool = setting(
        False, "the prompts do not decide the answers: the bench compares which parts an answer has, not the text"
    )


@dataclass(frozen=True)
class Sample:
    """A sample as text; ``line``: its number in the file, from 1."""

    line: int
    sheet: Sheet


@dataclass
class Collected:
    """The samples of a file, and the line numbers of malformed ones by kind."""

    samples: list[Sample] = field(default_factory=list)
    malformed: dict[str, list[int]] = field(default_factory=dict)

    def refuse(self, kind: str, line: int) -> None:
        """Count a line that cannot be used."""
        self.malformed.setdefault(kind, []).append(line)

    def report(self) -> list[str]:
        """Say what was found, in lines of text."""
        planned = [sample for sample in self.samples if sample.sheet.parts]
        parts = sum(len(sample.sheet.parts) for sample in planned)
        reading = sum(bool(part.depends) for sample in planned for part in sample.sheet.parts)
        lines = [
            f"{len(self.samples)} samples, {len(planned)} of them with a plan: {parts} parts, "
            f"{reading} of which read earlier parts"
        ]
        for kind, numbers in sorted(self.malformed.items(), key=lambda entry: -len(entry[1])):
            shown = ", ".join(map(str, numbers[:SHOWN_LINES])) + (", ..." if len(numbers) > SHOWN_LINES else "")
            lines.append(f"{len(numbers)} left out: {kind} (line{'s' * (len(numbers) > 1)} {shown})")
        return lines


def collect(path: Path, data: JsonLinesData) -> Collected:
    """Read and annotate a file. Blank lines are no samples.

    Raises:
        OSError: the file cannot be read.
    """
    found = Collected()
    with path.open("rb") as file:
        for number, line in _lines(file):
            try:
                found.samples.append(Sample(number, _sheet(number, line, data)))
            except SampleError as error:
                found.refuse(str(error), number)
    return found


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines that are not blank; a line above the limit is cut one byte behind the limit."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip() or len(line) > MAX_LINE_BYTES:
            yield number, line


def _sheet(number: int, line: bytes, data: JsonLinesData) -> Sheet:
    if len(line) > MAX_LINE_BYTES:
        raise SampleError(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError("not UTF-8") from error
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("not JSON") from error
    if not isinstance(record, Mapping):
        raise SampleError("not a JSON object")
    prompt, answer = (_text(record, name) for name in ("prompt", "answer"))
    pieces = annotate(answer, data) if record.get("plan") is None else _planned(answer, record["plan"])
    return Sheet(prompt, pieces, (f"line {number}",), data.open_answers)


def _text(record: Mapping[str, Any], name: str) -> str:
    if name not in record:
        raise SampleError(f"no field {name!r}")
    value = record[name]
    if not isinstance(value, str):
        raise SampleError(f"{name!r} is not a text")
    if not value.strip():
        raise SampleError(f"{name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleError(f"{name!r} holds half a character (a lone surrogate)") from error
    return value


def _planned(answer: str, plan: Any) -> tuple[Piece, ...]:
    """The pieces of an answer with a plan of its own; the text before the first label stays text."""
    if not isinstance(plan, list) or not plan or not all(isinstance(entry, Mapping) for entry in plan):
        raise SampleError("'plan' is not a list of {label, depends}")
    starts: list[int] = []
    labels: list[str] = []
    at = 0
    for entry in plan:
        label = entry.get("label")
        if set(entry) - {"label", "depends"} or not isinstance(label, str) or not label:
            raise SampleError("a part of 'plan' has no label, or fields other than label and depends")
        start = answer.find(label, at)
        if start < 0:
            raise SampleError("a label of 'plan' is not in the answer behind the one before it")
        starts.append(start)
        labels.append(label)
        at = start + len(label)
    parts = [
        SheetPart(label, answer[start + len(label) : end], _depends(entry, number))
        for number, (entry, label, start, end) in enumerate(
            zip(plan, labels, starts, [*starts[1:], len(answer)], strict=True)
        )
    ]
    return join_texts([answer[: starts[0]], *split_rounds(parts)])


def _depends(entry: Mapping[str, Any], number: int) -> tuple[int, ...]:
    """Dependencies of part ``number`` (0-based), 0-based."""
    depends = entry.get("depends", [])
    if not isinstance(depends, list) or not all(type(d) is int and 1 <= d <= number for d in depends):
        raise SampleError("'depends' of a part of 'plan' is not a list of earlier parts, counted from 1")
    return tuple(sorted({d - 1 for d in depends}))


def split_samples(samples: Sequence[Sample], held_out: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, held out): the share of the prompts, drawn by ``seed``; equal prompts stay together."""
    prompts = sorted({sample.sheet.prompt for sample in samples})
    count = max(2, round(held_out * len(prompts))) if held_out else 0
    chosen = set(Random(seed).sample(prompts, min(count, max(len(prompts) - 2, 0))))
    training = [sample for sample in samples if sample.sheet.prompt not in chosen]
    return training, [sample for sample in samples if sample.sheet.prompt in chosen]


def held_out_items(held_out: Sequence[Sample]) -> list[TestItem]:
    """Held-out prompts, each once, in turn for test and development."""
    first = {sample.sheet.prompt: sample for sample in reversed(held_out)}
    ordered = sorted(first.values(), key=lambda sample: sample.line)
    splits = ("test", "dev")
    return [
        TestItem(f"{splits[n % 2]}-{n // 2:03d}", splits[n % 2], sample.sheet, "groups")
        for n, sample in enumerate(ordered)
    ]


@dataclass
class ShuffledEpochs:
    """Examples by index: every epoch in another order, a function of the seed and the index alone."""

    examples: Sequence[Example]
    seed: int
    _order: tuple[int, list[int]] = (-1, [])

    def __call__(self, index: int) -> Example:
        """Example number ``index`` of the endless stream."""
        epoch, step = divmod(index, len(self.examples))
        if self._order[0] != epoch:
            order = list(range(len(self.examples)))
            Random(f"{self.seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self.examples[self._order[1][step]]
