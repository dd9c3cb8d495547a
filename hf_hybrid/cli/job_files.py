"""The files of ``hf-hybrid generate --output``: one of prompts, and one of answers, which a later run continues."""

from __future__ import annotations

import json
import time
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hf_hybrid.cli.command import UsageError

Record = dict[str, Any]
SETTINGS = "hf_hybrid"
"""Field of an answer: the settings that it was written with."""
ADDED = (SETTINGS, "text", "plan", "report", "error")
"""Fields that an answer adds to its record, in this order; fields of the record with such a name are left out."""


@dataclass(frozen=True)
class Job:
    """What is left to do.

    Attributes:
        records: prompts without an answer. done: number of answers, and failed: how many of these are errors.
        output: the file of the answers. settings: what they are written with. keep: bytes of the file to keep; what
        follows is the beginning of a line that was cut off. unended: True: the last line to keep lacks its line feed.
    """

    records: list[Record]
    done: int
    output: Path
    settings: Mapping[str, Any]
    failed: int = 0
    keep: int = 0
    unended: bool = False


def read_prompts(source: Path) -> tuple[list[Record], list[str]]:
    """Read JSON lines: objects with ``prompt`` (text) or ``messages`` (a chat), or strings; blank lines are skipped.

    Only a line feed ends a line: U+2028 and the like may occur in a JSON text.

    Returns:
        the records, and an error message for each line that is none.
    """
    records: list[Record] = []
    faults: list[str] = []
    for number, line in enumerate(source.read_bytes().removeprefix(BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            faults.append(f"{source}, line {number}: not UTF-8 ({error})")
            continue
        except (ValueError, RecursionError) as error:
            faults.append(f"{source}, line {number}: not JSON ({error})")
            continue
        record = {"prompt": value} if isinstance(value, str) else value
        fault = _fault(record)
        if fault:
            faults.append(f"{source}, line {number}: {fault}")
        else:
            records.append(record)
    if not records:
        raise UsageError(faults[0] if faults else f"{source} holds no prompts")
    return records, faults


def _fault(record: Any) -> str:
    """What is wrong with a record; empty: nothing."""
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        return 'give {"prompt": "..."} or {"messages": [...]}'
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError) as error:  # "\ud800" alone is JSON, but no text
        return f"holds what cannot be written as UTF-8 ({error})"
    if "prompt" in record:
        good = isinstance(record["prompt"], str) and record["prompt"].strip()
        return "" if good else "the prompt must be a text that is not empty"
    chat = record["messages"]
    good = isinstance(chat, list) and chat and all(map(_is_message, chat))
    return "" if good else 'messages must be a list of {"role": "...", "content": "..."}'


def _is_message(value: Any) -> bool:
    """True: a chat template can read it. Some templates take a list of contents, or no content beside tool calls."""
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        return False
    return isinstance(value["role"], str) and isinstance(value["content"], (str, list, type(None)))


def check_output(source: Path, output: Path) -> None:
    """Refuse a file of answers that cannot be one, or that is the file of the prompts."""
    if not output.resolve().parent.is_dir():
        raise UsageError(f"--output {output}: there is no such folder")
    if output.exists() and not output.is_file():
        raise UsageError(f"--output {output}: give an ordinary file; answers are appended to it")
    if source.exists() and output.exists() and source.samefile(output):
        raise UsageError(f"--output {output} is the file of the prompts (--input {source}); name another file")


def plan_job(records: Sequence[Record], output: Path, file: BinaryIO, settings: Mapping[str, Any]) -> Job:
    """Find the prompts that ``file``, opened from ``output``, has no answers to. Nothing is written.

    Raises:
        UsageError: it holds anything but answers to the first of these prompts with these settings, and perhaps the
            beginning of the next answer, which an interrupt cut off.
    """
    file.seek(0)
    text = file.read()
    keep = text.rfind(b"\n") + 1
    answers = [_read(line) for line in text[:keep].split(b"\n")[:-1]]
    tail, unended = text[keep:], False
    for number, (answer, record) in enumerate(zip(answers, records, strict=False), 1):
        _check_answer(answer, record, settings, f"{output}, line {number}", number)
    if len(answers) > len(records):
        raise UsageError(f"{output} holds {len(answers)} answers for {len(records)} prompts; name another file")
    if tail:
        number = len(answers) + 1
        record = records[number - 1] if number <= len(records) else None
        answer = _read(tail)
        if record is not None and isinstance(answer, dict):  # whole but for its line feed
            _check_answer(answer, record, settings, f"{output}, line {number}", number)
            answers.append(answer)
            keep, unended = len(text), True
        elif record is None or not _begins(tail, record, settings):
            raise UsageError(
                f"{output} ends with what is not the beginning of answer {number} with these settings; name another "
                "file, or repair this one"
            )
    failed = sum(answer["error"] is not None for answer in answers)
    return Job(list(records[len(answers) :]), len(answers), output, settings, failed, keep, unended)


def _read(line: bytes) -> Any:
    """The JSON value of a line; None: it is no JSON."""
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _check_answer(answer: Any, record: Record, settings: Mapping[str, Any], where: str, number: int) -> None:
    """Raise if a line is no answer to this record, or one with other settings."""
    mine = isinstance(answer, dict) and _as_text(_kept(answer)) == _as_text(_kept(record))
    if not mine:
        raise UsageError(f"{where} is no answer to prompt {number}; name another file, or delete this one")
    known = answer.get(SETTINGS)
    if not isinstance(known, dict) or not {"text", "error"} <= answer.keys():
        raise UsageError(
            f"{where} does not say with which settings it was answered ({SETTINGS}), so nothing is appended; name "
            "another file"
        )
    changed = differences(known, settings)
    if changed:
        raise UsageError(
            f"{where} was written with other settings ({'; '.join(changed)}); use the same, or name another file"
        )


def differences(known: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Describe what differs between the settings of an answer and those of a run.

    Where both know a digest of the model's files, its name does not matter, because a folder may have been moved.
    """
    names = [name for name in {**known, **settings} if _shown(known, name) != _shown(settings, name)]
    if known.get("files") and settings.get("files"):
        names = [name for name in names if name != "model"]
    words = {"files": "the files of the model"}
    return [f"{words.get(name, name)}: {_shown(known, name)}, now {_shown(settings, name)}" for name in names]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "unset"


def _kept(record: Record) -> Record:
    return {name: value for name, value in record.items() if name not in ADDED}


def _as_text(record: Record) -> str:
    """A text that is equal for equal records, NaN included."""
    return json.dumps(record, sort_keys=True)


def _line(record: Record, settings: Mapping[str, Any], addition: Mapping[str, Any]) -> str:
    whole = {**_kept(record), SETTINGS: dict(settings), **{name: addition.get(name) for name in ADDED[1:]}}
    return json.dumps(whole, ensure_ascii=False)


def _begins(tail: bytes, record: Record, settings: Mapping[str, Any]) -> bool:
    """True: ``tail`` may be the beginning of an answer to ``record``."""
    empty = _line(record, settings, {})
    known = empty[: empty.rindex(f', "{ADDED[2]}": ') - len("null")].encode()
    return known.startswith(tail) or tail.startswith(known)


def write_answers(job: Job, file: BinaryIO, answers: Iterator[tuple[int, Record]], console: Console) -> int:
    """Append answers in the order of their prompts; each is flushed as soon as those before it are written.

    Args:
        file: open for appending, as ``plan_job`` read it.
        answers: (index in ``job.records``, what to add to the record), in any order; ``report`` counts the tokens.
        console: for the progress bar, or one line at the end when it is no terminal.

    Returns:
        number of records in the file that are errors.
    """
    waiting: dict[int, Record] = {}
    tokens, written, failed, started = 0, 0, job.failed, time.perf_counter()
    columns = (
        TextColumn("answers"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=job.done + len(job.records), completed=job.done, speed="")
        try:
            file.truncate(job.keep)
            if job.unended:
                file.write(b"\n")
                file.flush()
            for index, addition in answers:
                waiting[index] = addition
                tokens += addition["report"]["num_tokens"]
                while written in waiting:
                    addition = waiting.pop(written)
                    file.write(_line(job.records[written], job.settings, addition).encode() + b"\n")
                    file.flush()
                    written += 1
                    failed += addition["error"] is not None
                speed = f"{tokens / (time.perf_counter() - started):.0f} tokens/s"
                bar.update(task, completed=job.done + written, speed=speed)
        except BaseException as error:  # an interrupt, a disk that is full, a device that is out of memory
            if written or not isinstance(error, ValueError):  # the options were wrong
                console.print(
                    f"{job.done + written} of {job.done + len(job.records)} answers are in {job.output}; "
                    "the same command goes on from there",
                    markup=False,
                    soft_wrap=True,
                )
            raise
    seconds = time.perf_counter() - started
    console.print(
        f"{written} answers in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s: {job.output}"
        + (f" ({job.done} were there before)" if job.done else ""),
        markup=False,
        soft_wrap=True,
    )
    return failed
