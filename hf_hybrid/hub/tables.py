"""Tables of a model card and of a README, from the JSON of ``hf-hybrid bench --json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


class CardError(ValueError):
    """Results or a document that a card cannot be written from; the message names the file."""


def read_results(path: Path) -> dict[str, Any]:
    """The JSON of a bench run.

    Raises:
        CardError: not such a JSON.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not data["results"] or "shape" not in data:
            raise KeyError("results")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CardError(f"{path} is not what `hf-hybrid bench --json` writes: {error!r}") from error
    return data


def render_table(data: Mapping[str, Any]) -> str:
    """Render a bench run as Markdown: a line on the run, a table, equal texts, and the groups."""
    shape = data["shape"]
    uneven = shape["longest_to_mean_part"]  # None: no sheet has parts
    parts = "" if uneven is None else f" in {shape['parts']:g} parts, the longest part {uneven:.2f} times the mean"
    lines = [
        f"{_conditions(data)} (`{data['command']}`). "
        f"Medians: prompt {shape['prompt_tokens']:g} tokens, "
        f"answer {shape['answer_tokens']:g} tokens{parts}.",
        "",
        "| | seconds | speedup | over all | tokens per pass | passes | first text, s | lines right | answers right |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in data["results"]:
        name = f"`{result['name']}`" + (" (baseline)" if result["baseline"] else "")
        lines.append(
            f"| {name} | {_number(result['seconds_per_answer'], 3)} | {_times(result)} "
            f"| {_number(result['speedup_all'], 2, 'x')} | {_number(result['tokens_per_forward'], 1)} "
            f"| {_number(result['num_forwards'], 1)} | {_number(result['seconds_to_first_text'], 3)} "
            f"| {result['field_exact_match']:.1%} | {_share(result)} |"
        )
    lines += ["", _speedup_note(data)]
    for result in data["results"]:
        if result["equal_to"] is not None:
            share = f"{result['equal_share']:.1%}"
            lines.append(f"`{result['name']}` wrote the same text as `{result['equal_to']}` on {share} of the prompts.")
    groups = data.get("groups") or []
    if len(groups) > 1:
        lines += ["", render_groups(groups)]
    return "\n".join(lines)


def render_summary(data: Mapping[str, Any]) -> str:
    """Render a bench run in four columns, for the first page of a repository."""
    lines = ["| | seconds | speedup | answers right |", "|---|---|---|---|"]
    for result in data["results"]:
        name = f"`{result['name']}`" + (" (baseline)" if result["baseline"] else "")
        seconds = _number(result["seconds_per_answer"], 3)
        lines.append(f"| {name} | {seconds} | {_times(result)} | {_share(result)} |")
    return "\n".join([*lines, "", f"{_conditions(data)}. {_speedup_note(data)}"])


def render_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    """Render a bench run by how many parts of an answer read other parts: where many do, less is written at once."""
    heads = [(f"{group['dependent_parts']}: speedup", "prompts", "answers right") for group in groups]
    lines = [
        "By the number of parts that read other parts and must wait for them ("
        + ", ".join(f"{group['dependent_parts']}: {group['num_prompts']} prompts" for group in groups)
        + "); a speedup is the median over the prompts where both answers are right, and `prompts` counts those:",
        "",
        "| | " + " | ".join(cell for head in heads for cell in head) + " |",
        "|---" * (1 + sum(map(len, heads))) + "|",
    ]
    for row in zip(*(group["results"] for group in groups), strict=True):
        cells = [
            (_number(r["speedup"], 2, "x"), str(r["speedup_prompts"]), f"{r['answer_exact_match']:.1%}") for r in row
        ]
        lines.append(f"| `{row[0]['name']}` | " + " | ".join(cell for three in cells for cell in three) + " |")
    return "\n".join(lines)


def render_passes(data: Mapping[str, Any]) -> str:
    """Render what a pass costs beside the host's own ``forward()``; empty if the run did not measure it."""
    costs = data.get("pass_costs") or []
    if not costs:
        return ""
    lines = [
        "One pass beside the host's own `forward()` over as many rows, behind as many tokens:",
        "",
        "| tokens before | rows | pass, ms | `forward()`, ms | ratio |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {c['written']} | {c['rows']} | {c['runner_ms']:.2f} | {c['forward_ms']:.2f} | {c['ratio']:.2f} |"
        for c in costs
    ]
    return "\n".join(lines)


def update_readme(readme: Path, results: Path) -> None:
    """Put the short table of ``results`` between the markers of ``readme``."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise CardError(f"{readme} needs the markers {BEGIN} and {END}, once each and in this order")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    readme.write_text(f"{head}\n{render_summary(read_results(results))}\n{tail}", encoding="utf-8")


def _conditions(data: Mapping[str, Any]) -> str:
    """The conditions of a run in words."""
    device = data["device"]
    where = device["processor"]
    if device["type"] == "cpu":
        where = f"{device['threads']} CPU threads ({where})"
    source = f"{data['num_prompts']} {_source(data['shape'])}, {_batches(data)}"
    return f"{source}, {device['dtype']}, {where}, one interleaved run"


def _speedup_note(data: Mapping[str, Any]) -> str:
    """What the speedups are over, and the baseline."""
    counted = [result["speedup_prompts"] for result in data["results"]]
    return (
        f"Speedup: median over the prompts where both answers are right ({_range(counted)} of {data['num_prompts']}); "
        f"in brackets 95 % intervals over {'countries' if 'countries' in data['shape'] else 'groups'}. "
        "The baseline is the faster of the host's `generate()` and `autoregressive`, both writing the plain answer."
    )


def _source(shape: Mapping[str, Any]) -> str:
    """What the prompts were drawn from."""
    if "countries" in shape:
        return f"prompts from {shape['countries']} countries never seen"
    return f"prompts in {shape['groups']} groups, held out"


def _batches(data: Mapping[str, Any]) -> str:
    size = data["batch_size"]
    return "one at a time" if size == 1 else f"in batches of {size}"


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _times(result: Mapping[str, Any]) -> str:
    interval = result["speedup_interval"]
    bounds = f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else ""
    return _number(result["speedup"], 2, f"x{bounds}")


def _share(result: Mapping[str, Any]) -> str:
    interval = result["answer_exact_match_interval"]
    bounds = f" ({interval[0]:.0%}-{interval[1]:.0%})" if interval else ""
    return f"{result['answer_exact_match']:.1%}{bounds}"
