"""``hf-hybrid plan``: the plan of an answer as JSON, to be edited and given back with ``generate --plan``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_hybrid.cli.command import DEFAULT_MODEL, Model, Threads, UsageError, load, quiet
from hf_hybrid.cli.prompts import encode, read_prompt
from hf_hybrid.core.plan import Plan, PlanError, Span

FORM = (
    '{"rounds": [{"lead": text, "parts": [{"label": text, "length": tokens, "depends": [part, ...], "text": text}]}]}'
)


def plan(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads standard input.")] = None,
    *,
    source: Annotated[Path | None, typer.Option("--input", "-i", help="Read the prompt from this file.")] = None,
    texts: Annotated[bool, typer.Option("--texts", help="With the texts of the parts, which then are kept.")] = False,
    model: Model = DEFAULT_MODEL,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template of the model.")] = False,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    threads: Threads = None,
) -> None:
    """Print the plan of the answer to PROMPT as JSON.

    Parts may be added, dropped, moved, renamed, re-lengthed, and made to depend on earlier ones ("depends" counts from
    1); hf-hybrid generate --plan FILE carries the plan out. A part with a "text" is kept, one without is written.
    """
    text = read_prompt(prompt, source)
    with quiet():
        network, tokenizer, _ = load(model, dtype, device, threads)
        inputs = {name: ids.to(network.device) for name, ids in encode(tokenizer, text, chat).items()}
        output = network.generate(
            **inputs,
            strategy="planned_diffusion",
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
    report = output.report[0]
    written = {(span.round, span.part): tuple(span.tokens) for span in report.spans}
    plans = [
        replace(p, spans=tuple(replace(s, text=written.get((number, i))) for i, s in enumerate(p.spans)))
        for number, p in enumerate(report.plans, 1)
    ]
    typer.echo(json.dumps(as_json(plans if texts else report.plans, tokenizer), ensure_ascii=False, indent=1))


def as_json(plans: Sequence[Plan], tokenizer: Any) -> dict[str, Any]:
    """Plans as they are printed; ``from_json`` reads them."""

    def part(span: Span) -> dict[str, Any]:
        shown = {"label": tokenizer.decode(span.label), "length": span.length, "depends": [d + 1 for d in span.depends]}
        return shown if span.text is None else {**shown, "text": tokenizer.decode(span.text)}

    return {"rounds": [{"lead": tokenizer.decode(p.lead), "parts": [part(span) for span in p.spans]} for p in plans]}


def from_json(data: Any, tokenizer: Any) -> list[Plan]:
    """Plans from their JSON; what is wrong with it is a ``UsageError`` that names the part."""

    def ids(text: Any, where: str) -> tuple[int, ...]:
        if not isinstance(text, str):
            raise UsageError(f"{where} must be a text, not {text!r}")
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    rounds = data.get("rounds") if isinstance(data, Mapping) else None
    if not isinstance(rounds, list) or not rounds:
        raise UsageError(f"a plan has the form {FORM}")
    plans: list[Plan] = []
    for number, entry in enumerate(rounds, 1):
        parts = entry.get("parts") if isinstance(entry, Mapping) else None
        if not isinstance(parts, list):
            raise UsageError(f"round {number} has no parts; a plan has the form {FORM}")
        spans: list[Span] = []
        for place, part in enumerate(parts, 1):
            where = f"round {number}, part {place}"
            unknown = set(part) - {"label", "length", "depends", "text"} if isinstance(part, Mapping) else {str(part)}
            if unknown or "label" not in part:
                raise UsageError(f"{where} needs a label and may have length, depends and text, not {sorted(unknown)}")
            length, depends = part.get("length", 32), part.get("depends", [])
            whole = isinstance(length, int) and isinstance(depends, list) and all(isinstance(d, int) for d in depends)
            if not whole:
                raise UsageError(f"{where}: length is a number of tokens, and depends a list of part numbers from 1")
            text = None if part.get("text") is None else ids(part["text"], f"{where}: text")
            spans.append(Span(ids(part["label"], f"{where}: label"), length, tuple(d - 1 for d in depends), text))
        plans.append(Plan(tuple(spans), ids(entry.get("lead", ""), f"round {number}: lead")))
    return plans


def read_plans(path: Path, only: str | None, tokenizer: Any) -> list[Plan]:
    """The plans of a file; with ``only`` (``PART`` or ``ROUND.PART``, from 1) that part is to be written again."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    plans = from_json(data, tokenizer)
    if only is None:
        return plans
    first, dot, second = only.partition(".")
    if not first.isdigit() or (dot and not second.isdigit()):
        raise UsageError(f"--only {only}: give the number of a part, or ROUND.PART")
    number, part = (int(first), int(second)) if dot else (1, int(first))
    if not 1 <= number <= len(plans):
        raise UsageError(f"--only {only}: the plan has {len(plans)} rounds")
    spans = plans[number - 1].spans
    if len(spans) > 1 and all(span.text is None for span in spans):
        raise UsageError(f"--only {only} keeps the other parts, and {path} has no texts; make it with plan --texts")
    try:
        plans[number - 1] = plans[number - 1].reopen(part - 1)
    except PlanError as error:
        raise UsageError(f"--only {only}: {error}") from error
    return plans
