"""``hf-hybrid generate --output``: answers a file of prompts, and continues an interrupted run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from hf_hybrid.cli.command import InputError, UsageError, folder_of, load
from hf_hybrid.cli.job_files import Job, check_output, plan_job, read_prompts, write_answers
from hf_hybrid.cli.locked import locked
from hf_hybrid.cli.plan import as_json as plan_json
from hf_hybrid.cli.prompts import encode, needs_template

CHUNK, MOST_CHUNKS = 1 << 20, 256
"""Bytes of a piece, and the most pieces that are read of a file for its digest; smaller files are read whole."""


def answer_file(
    source: Path,
    target: Path,
    call: Mapping[str, Any],
    *,
    model: str,
    dtype: str,
    device: str,
    threads: int | None,
    chat: bool,
    batch_size: int,
) -> None:
    """Answer every prompt of ``source`` and append the answers to ``target``.

    Args:
        call: strategy, its settings, and what else ``generate_many`` takes.

    Raises:
        UsageError: files that do not go together; nothing was changed.
        InputError: prompts that were left out or could not be answered; the others were.
    """
    check_output(source, target)
    records, faults = read_prompts(source)
    settings = {"model": model, **_files(model), "dtype": dtype, "chat": chat, **call}
    with locked(target) as file:
        job = plan_job(records, target, file, settings)
        for fault in faults:
            typer.echo(fault, err=True)
        answers: Iterator[tuple[int, dict[str, Any]]] = iter(())
        if job.records:
            network, tokenizer, _ = load(model, dtype, device, threads)
            answers = answers_of(network, tokenizer, job, chat, batch_size, call)
        failed = write_answers(job, file, answers, Console(stderr=True))
    said = [f"{len(faults)} lines of {source} were left out; they are named above"] if faults else []
    if failed:
        said.append(f'{failed} prompts of {source} have no answer; "error" in {target} says why')
    if said:
        raise InputError("; ".join(said))


def answers_of(
    network: Any, tokenizer: Any, job: Job, chat: bool, batch_size: int, call: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index of each record, and text, plan, report and error of its answer."""
    from hf_hybrid import generate_many

    if chat:
        needs_template(tokenizer)
    faults: dict[int, str] = {}
    goes_on = bool(call.get("continue_final_message"))

    def prompts() -> Iterator[Any]:
        for index, record in enumerate(job.records):
            try:
                yield encode(tokenizer, record.get("messages") or record["prompt"], chat, goes_on)["input_ids"][0]
            except (InputError, UsageError) as error:
                faults[index] = str(error)
                yield ()

    call = {**call, "tokenizer": tokenizer}
    if call.get("seed") is not None:
        call["seed"] += job.done  # an answer has its own seed, also after an interrupt
    for answer in generate_many(network, prompts(), batch_size=batch_size, **call):
        fault = faults.pop(answer.index, answer.error)
        text = None if fault else tokenizer.decode(answer.tokens, skip_special_tokens=True)
        yield answer.index, {**answer_json(text, answer.report, tokenizer), "error": fault}


def answer_json(text: str | None, report: Any, tokenizer: Any) -> dict[str, Any]:
    """Text, plan (as ``hf-hybrid plan`` prints it) and report of an answer; the host gives text alone."""
    if report is None:
        return {"text": text, "plan": None, "report": None}
    numbers = report.as_data() | {"spans": [span.as_data(tokenizer.decode) for span in report.spans]}
    return {"text": text, "plan": plan_json(report.plans, tokenizer), "report": numbers}


def _files(model: str) -> dict[str, str]:
    """``files``: a digest of the files in a model's folder; empty for a model that is no folder."""
    folder = folder_of(model)
    if not folder.is_dir():
        return {}
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt") and path.is_file():
            digest.update(path.name.encode() + b"\0")
            _add(digest, path)
    return {"files": digest.hexdigest()[:16]}


def _add(digest: Any, path: Path) -> None:
    """Add the size of a file and evenly spaced pieces of it to ``digest``."""
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "big"))
    step = max(CHUNK, size // MOST_CHUNKS)
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(CHUNK))
