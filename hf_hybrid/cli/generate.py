"""``hf-hybrid generate``: answer one prompt, or a file of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from hf_hybrid.cli.command import DEFAULT_MODEL, Model, Threads, UsageError, load, quiet
from hf_hybrid.cli.lines import Job, plan_job, read_prompts, write_answers
from hf_hybrid.cli.options import given_settings, setting_parameters
from hf_hybrid.cli.plan import read_plans
from hf_hybrid.cli.prompts import encode, read_prompt
from hf_hybrid.config import SETTINGS

Strategy = Literal["host", *SETTINGS]  # type: ignore[valid-type]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads standard input.")] = None,
    *,
    source: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="Read the prompt from this file; with --output, JSON lines of prompts."),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Answer every line of --input and append the answers to this file."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers written at the same time, with --output.")] = 8,
    strategy: Annotated[
        Strategy,  # type: ignore[valid-type]
        typer.Option("--strategy", "-s", help="How to write; host: generate() of transformers."),
    ] = "planned_diffusion",
    model: Model = DEFAULT_MODEL,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Sample instead of taking the best token.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Of sampling, above 0; needs --do-sample.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template of the model.")] = False,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Carry out this plan (JSON of hf-hybrid plan) instead of writing one.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", help="Write this part of --plan (3, or 2.3: of round 2) and what depends on it anew."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, plan and report as JSON.")] = False,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    threads: Threads = None,
    **options: Any,
) -> None:
    """Write an answer to PROMPT.

    Without --json the text appears as it is confirmed. What no option names comes from the checkpoint.

    With --output, --input holds JSON lines: {"prompt": "..."} or {"messages": [...]}; other fields are kept. Answers
    are appended in the same order, one by one; a run that was interrupted goes on where it stopped.
    """
    if plan is not None and strategy != "planned_diffusion":
        raise UsageError(f"--plan needs --strategy planned_diffusion, not {strategy}")
    if only is not None and plan is None:
        raise UsageError("--only needs --plan")
    job = _job(prompt, source, target, strategy, as_json, plan is not None)
    text = "" if job else read_prompt(prompt, source)
    if temperature is not None and not do_sample:
        raise UsageError("--temperature needs --do-sample")
    if temperature is not None and not temperature > 0:
        raise UsageError(f"--temperature {temperature}: must be above 0")
    settings = given_settings(options)
    with quiet():
        import torch
        from transformers import TextStreamer

        network, tokenizer, _ = load(model, dtype, device, threads)
        call: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
        if temperature is not None:
            call["temperature"] = temperature
        if job is not None:
            call |= {"strategy": strategy, **settings}
            write_answers(job, _answers(network, tokenizer, job, chat, batch_size, call), Console(stderr=True))
            return
        inputs = {name: ids.to(network.device) for name, ids in encode(tokenizer, text, chat).items()}
        if strategy == "host":
            seed = settings.pop("seed", None)
            if seed is not None:
                torch.manual_seed(seed)
            if settings:
                raise UsageError(f"--strategy host takes no settings, not {', '.join(sorted(settings))}")
            call["hf_hybrid"] = {}  # the host, also where the checkpoint names a strategy
        else:
            call |= {"strategy": strategy, **settings}
        if plan is not None:
            call["plan"] = read_plans(plan, only, tokenizer)
        if not as_json:
            call["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = network.generate(**inputs, return_dict_in_generate=True, **call)
        if as_json:
            new = output.sequences[0, inputs["input_ids"].shape[1] :]  # (new,)
            written = tokenizer.decode(new, skip_special_tokens=True)
            report = output.report[0] if strategy != "host" else None
            typer.echo(json.dumps(_as_json(written, report, tokenizer), ensure_ascii=False, indent=1))


generate.__signature__ = (
    lambda s: s.replace(  # type: ignore[attr-defined]
        parameters=[*(p for p in s.parameters.values() if p.kind is not p.VAR_KEYWORD), *setting_parameters()]
    )
)(inspect.signature(generate, eval_str=True))


def _job(
    prompt: str | None, source: Path | None, target: Path | None, strategy: str, as_json: bool, plan: bool
) -> Job | None:
    """What --output asks for; None without it."""
    if target is None:
        return None
    if prompt is not None or source is None:
        raise UsageError("--output needs --input FILE with one prompt a line, and no PROMPT")
    if as_json or plan:
        raise UsageError("--output writes JSON, and every prompt its own plan: leave --json and --plan out")
    if strategy == "host":
        raise UsageError("--output needs a strategy of this package; try --strategy autoregressive")
    return plan_job(read_prompts(source), target)


def _answers(
    network: Any, tokenizer: Any, job: Job, chat: bool, batch_size: int, call: dict[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Place of each record, and text, plan and report of its answer."""
    from hf_hybrid import generate_many

    prompts = (encode(tokenizer, r.get("messages") or r["prompt"], chat)["input_ids"][0] for r in job.records)
    seed = call.pop("seed", None)
    if seed is not None:
        call["seed"] = seed + job.done  # an answer has its own seed, also after an interrupt
    for answer in generate_many(network, prompts, batch_size=batch_size, **call):
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        yield answer.index, _as_json(text, answer.report, tokenizer)


def _as_json(text: str, report: Any, tokenizer: Any) -> dict[str, Any]:
    if report is None:
        return {"text": text, "plan": None, "report": None}

    def part(label: tuple[int, ...], depends: tuple[int, ...]) -> dict[str, Any]:
        return {"label": tokenizer.decode(label).strip(), "depends": [d + 1 for d in depends]}

    plan = [[{**part(s.label, s.depends), "length": s.length} for s in p.spans] for p in report.plans]
    numbers = asdict(report) | {"tokens_per_forward": report.tokens_per_forward}
    numbers.pop("plans")
    numbers["spans"] = [
        {**asdict(span), **part(span.label, span.depends), "tokens": len(span.tokens), "part": span.part + 1}
        for span in report.spans
    ]
    return {"text": text, "plan": plan, "report": numbers}
