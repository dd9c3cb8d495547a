"""``hf-hybrid tune``: sets the defaults of a checkpoint from a measured sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_hybrid.cli.command import UsageError
from hf_hybrid.config import settings_for

CHOSEN = {
    "planned_diffusion": ("verified", ("window_length", "draft_threshold", "plan_window")),
    "block_diffusion": ("block", ("window_length", "confidence_threshold")),
}
"""Strategy -> the family of the sweep that its default comes from, and the settings that are taken over."""


def tune(
    folder: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
    results: Annotated[Path, typer.Argument(help="JSON of hf-hybrid bench --sweep --json.")],
    *,
    tolerance: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Loss of exact match that is still the best.")
    ] = 0.01,
    margin: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of the time that new settings must save to replace the stored ones."
        ),
    ] = 0.03,
    write: Annotated[bool, typer.Option("--write/--dry-run", help="Change the checkpoint, or only say how.")] = True,
) -> None:
    """Write the fastest settings of a sweep into the generation_config.json of a checkpoint.

    For planned diffusion these are the fastest verified ones whose text equals span-autoregressive decoding as often as
    any does; for block diffusion the fastest within --tolerance of the best exact match. What is stored in the
    checkpoint stays unless others are faster by more than --margin, the noise of a sweep. Nothing tunes itself while
    text is generated.
    """
    path = folder / "generation_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    try:
        measured = json.loads(results.read_text(encoding="utf-8"))["results"]
        stored = dict(config.get("hf_hybrid") or {})
        found = {strategy: choose(measured, strategy, tolerance, margin) for strategy in CHOSEN}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{results} is not what `hf-hybrid bench --sweep --json` writes: {error!r}") from error
    for strategy, result in found.items():
        if result is None:
            typer.echo(f"{strategy}: the sweep has no settings of it; left as it is")
            continue
        new = {name: result["settings"][name] for name in CHOSEN[strategy][1]}
        stored[strategy] = {**(stored.get(strategy) or {}), **new}
        settings_for(strategy, {}, stored)  # what is written can be read
        shown = ", ".join(f"{name}={value}" for name, value in new.items())
        typer.echo(
            f"{strategy}: {shown} ({result['seconds_per_answer']:.3f} s, {result['answer_exact_match']:.1%} right)"
        )
    if write:
        config["hf_hybrid"] = stored
        fresh = path.with_suffix(".json.new")
        fresh.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        fresh.replace(path)
        typer.echo(f"written to {path}")


def choose(
    results: Sequence[Mapping[str, Any]], strategy: str, tolerance: float, margin: float
) -> Mapping[str, Any] | None:
    """The fastest result of the family of ``strategy`` that is as good as the best of it, or the default when that is
    slower by at most ``margin``; None: there is none."""
    from hf_hybrid.evaluation.frontier import is_default

    family = [r for r in results if r["strategy"] == strategy and r["name"].split()[0] == CHOSEN[strategy][0]]
    if not family:
        return None
    if all(r["equal_share"] is not None for r in family):
        most = max(r["equal_share"] for r in family)
        good = [r for r in family if r["equal_share"] == most]
    else:
        best = max(r["answer_exact_match"] for r in family)
        good = [r for r in family if r["answer_exact_match"] >= best - tolerance]
    fastest = min(good, key=lambda r: r["seconds_per_answer"])
    default = next((r for r in good if is_default(r)), fastest)
    saved = 1.0 - fastest["seconds_per_answer"] / default["seconds_per_answer"]
    return fastest if saved > margin else default
