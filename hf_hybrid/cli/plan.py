"""``hf-hybrid plan``: the plan of an answer as JSON, to be edited and given back with ``generate --plan``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_hybrid.cli.command import DEFAULT_MODEL, Model, Threads, UsageError, load, quiet
from hf_hybrid.cli.prompts import encode, read_prompt
from hf_hybrid.config import PlannedDiffusionSettings

if TYPE_CHECKING:
    from hf_hybrid.core.plan import Plan, Span

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
            tokenizer=tokenizer,  # of stop strings that the checkpoint names
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
    """Plans as JSON, which ``from_json`` reads."""
    from hf_hybrid.decoding.output import plans_as_data  # brings torch, which errors of usage do without

    return plans_as_data(plans, tokenizer.decode)


def from_json(data: Any, tokenizer: Any) -> list[Plan]:
    """Read plans from their JSON; an error is a ``UsageError`` that names the part."""
    from hf_hybrid.core.plan import Plan, Span

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def span(part: Mapping[str, Any]) -> Span:
        depends = tuple(d - 1 for d in part.get("depends", []))
        text = None if part.get("text") is None else ids(part["text"])
        return Span(ids(part["label"]), part.get("length", 32), depends, text)

    return [
        Plan(tuple(span(part) for part in entry["parts"]), ids(entry.get("lead", ""))) for entry in check_form(data)
    ]


def check_form(data: Any) -> list[Any]:
    """Check the form of a plan in JSON and return its rounds; lengths and labels are checked later, with the model."""
    rounds = data.get("rounds") if isinstance(data, Mapping) else None
    if not isinstance(rounds, list) or not rounds or set(data) != {"rounds"}:
        raise UsageError(f"a plan has the form {FORM}")
    most = next(field.metadata["high"] for field in fields(PlannedDiffusionSettings) if field.name == "max_parts")
    for number, entry in enumerate(rounds, 1):
        parts = entry.get("parts") if isinstance(entry, Mapping) else None
        if not isinstance(parts, list):
            raise UsageError(f"round {number} has no parts; a plan has the form {FORM}")
        if unknown := sorted(set(entry) - {"lead", "parts"}):
            raise UsageError(f"round {number} may have lead and parts, not {unknown}")
        if not isinstance(entry.get("lead", ""), str):
            raise UsageError(f"round {number}: lead must be a text, not {entry['lead']!r}")
        if len(parts) > most:
            raise UsageError(f"round {number} has {len(parts)} parts; no plan may have more than {most}")
        for part_number, part in enumerate(parts, 1):
            _check_part(part, f"round {number}, part {part_number}", len(parts))
    return rounds


def _check_part(part: Any, where: str, count: int) -> None:
    """Raise a ``UsageError`` if ``part``, one of ``count``, does not have the form of a part."""
    unknown = set(part) - {"label", "length", "depends", "text"} if isinstance(part, Mapping) else {str(part)}
    if unknown or "label" not in part:
        raise UsageError(f"{where} needs a label and may have length, depends and text, not {sorted(unknown)}")
    depends = part.get("depends", [])
    whole = [part.get("length", 32), *depends] if isinstance(depends, list) else [None]
    if not all(type(value) is int for value in whole):  # True is an int too
        raise UsageError(f"{where}: length is a number of tokens, and depends a list of part numbers from 1")
    missing = next((d for d in depends if not 1 <= d <= count), None)
    if missing is not None:
        raise UsageError(f"{where} depends on part {missing}; the round has parts 1 to {count}")
    for name in ("label", "text"):
        if not isinstance(part.get(name, ""), str) and not (name == "text" and part[name] is None):
            raise UsageError(f"{where}: {name} must be a text, not {part[name]!r}")


def read_plan_file(path: Path) -> Any:
    """Read the JSON of a plan and check its form, before a model is loaded."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    try:
        check_form(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return data


def plans_to_write(data: Any, only: str | None, tokenizer: Any) -> list[Plan]:
    """The plans of a file, each part behind those that it depends on.

    With ``only`` (``PART`` or ``ROUND.PART``, numbers of the file, from 1) that part is to be written again.
    """
    from hf_hybrid.core.plan import PlanError

    plans = from_json(data, tokenizer)
    if only is not None:
        number, part = _part_number(only)
        if not 1 <= number <= len(plans):
            raise UsageError(f"--only {only}: the plan has {len(plans)} rounds")
        spans = plans[number - 1].spans
        if len(spans) > 1 and all(span.text is None for span in spans):
            raise UsageError(
                f"--only {only} keeps the other parts, and the plan has no texts; make it with plan --texts"
            )
        try:
            plans[number - 1] = plans[number - 1].reopen(part - 1)
        except PlanError as error:
            raise UsageError(f"--only {only}: {error}") from error
    sorted_plans: list[Plan] = []
    for number, plan in enumerate(plans, 1):
        try:
            sorted_plans.append(plan.sorted())
        except PlanError as error:
            raise UsageError(f"round {number}: {error}") from error
    return sorted_plans


def _part_number(only: str) -> tuple[int, int]:
    """Round and part of ``--only``, from 1."""
    first, dot, second = only.partition(".")
    if not first.isdigit() or (dot and not second.isdigit()):
        raise UsageError(f"--only {only}: give the number of a part, or ROUND.PART")
    return (int(first), int(second)) if dot else (1, int(first))
