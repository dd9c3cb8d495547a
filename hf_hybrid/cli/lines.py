"""``hf-hybrid generate --output``: from a file of prompts to a file of answers, and on from where it stopped."""

from __future__ import annotations

import json
import time
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hf_hybrid.cli.command import UsageError

Record = dict[str, Any]
ADDED = frozenset({"text", "plan", "report"})
"""Fields that an answer adds to its record; they take the place of fields of that name."""


@dataclass(frozen=True)
class Job:
    """What is left to do: ``records`` that have no answer yet, and how many have one (``done``)."""

    records: list[Record]
    done: int
    output: Path


def read_prompts(source: Path) -> tuple[list[Record], list[str]]:
    """JSON lines: objects with ``prompt`` (text) or ``messages`` (a chat), or strings; blank lines are skipped.

    A line ends with a line feed and nowhere else: U+2028 and the like may stand in a JSON text as they are.

    Returns:
        the records, and what is wrong with each line that is none.
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
    """True: a chat template can read it. Some templates take a list of contents, and none in an answer of tools."""
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        return False
    return isinstance(value["role"], str) and isinstance(value["content"], (str, list, type(None)))


def plan_job(records: Sequence[Record], output: Path) -> Job:
    """What ``output`` lacks. A line that an interrupt cut in two is taken off; answers to other prompts are refused."""
    if not output.resolve().parent.is_dir():
        raise UsageError(f"--output {output}: there is no such folder")
    if output.exists() and not output.is_file():
        raise UsageError(f"--output {output}: give an ordinary file; answers are appended to it")
    text = output.read_bytes() if output.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    answers = whole.decode("utf-8", errors="replace").split("\n")[:-1]
    for number, (line, record) in enumerate(zip(answers, records, strict=False), 1):
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        kept = {name: value for name, value in record.items() if name not in ADDED}
        if not isinstance(answer, dict) or any(answer.get(name) != value for name, value in kept.items()):
            raise UsageError(
                f"{output}, line {number} is no answer to prompt {number}; name another file, or delete this one"
            )
    if len(answers) > len(records):
        raise UsageError(f"{output} holds {len(answers)} answers for {len(records)} prompts; name another file")
    if len(whole) < len(text):
        with output.open("r+b") as file:
            file.truncate(len(whole))
    return Job(list(records[len(answers) :]), len(answers), output)


def write_answers(job: Job, answers: Iterator[tuple[int, Record]], console: Console) -> None:
    """Append answers in the order of their prompts, each flushed as soon as those before it stand.

    Args:
        answers: (place in ``job.records``, what to add to the record), in any order; ``report`` counts the tokens.
        console: for the progress bar, or one line at the end when it is no terminal.
    """
    waiting: dict[int, Record] = {}
    tokens, written, started = 0, 0, time.perf_counter()
    columns = (
        TextColumn("answers"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with (
        job.output.open("a", encoding="utf-8") as file,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("", total=job.done + len(job.records), completed=job.done, speed="")
        try:
            for index, addition in answers:
                waiting[index] = addition
                tokens += addition["report"]["num_tokens"]
                while written in waiting:
                    line = {**job.records[written], **waiting.pop(written)}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    written += 1
                speed = f"{tokens / (time.perf_counter() - started):.0f} tokens/s"
                bar.update(task, completed=job.done + written, speed=speed)
        except (KeyboardInterrupt, OSError):  # an interrupt, or a disk that is full
            console.print(
                f"{job.done + written} of {job.done + len(job.records)} answers stand in {job.output}; "
                "the same command goes on from there",
                markup=False,
            )
            raise
    seconds = time.perf_counter() - started
    console.print(
        f"{written} answers in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s: {job.output}"
        + (f" ({job.done} stood there before)" if job.done else ""),
        markup=False,
    )
