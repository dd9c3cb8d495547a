"""``hf-hybrid train``: from a recipe to a checkpoint."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text as RichText

from hf_hybrid.cli.command import INTERRUPTED, UsageError, console

if TYPE_CHECKING:
    from hf_hybrid.training.tasks import Maker

Recipe = Annotated[Path, typer.Argument(help="YAML file of the recipe.")]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on from the last whole checkpoint, if there is one.")
]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Stop after this many steps.")]
Check = Annotated[
    bool, typer.Option("--check", help="Read the data, show what was found and one plan, and train nothing.")
]


def train(recipe: Recipe, *, resume: Resume = True, max_steps: MaxSteps = None, check: Check = False) -> None:
    """Train the checkpoint that RECIPE describes.

    Ctrl-C is safe: the same command goes on from the last whole checkpoint.
    """
    run(recipe, resume=resume, max_steps=max_steps, check=check)


def run(
    recipe: Path,
    *,
    resume: bool,
    max_steps: int | None,
    check: bool,
    tasks: Mapping[str, Maker] | None = None,
    command: Sequence[str] = ("hf-hybrid", "train"),
) -> None:
    """Train a recipe, or check its data.

    Args:
        tasks: that the recipe may name; None: those of the package. command: how a run is resumed.
    """
    if recipe.is_dir():
        raise UsageError(f"{recipe} is a folder; name the YAML file of a recipe")
    if not recipe.exists():
        raise UsageError(f"there is no recipe {recipe}; the source repository has recipes/jsonl.yaml to begin with")
    from hf_hybrid.training.recipe import read_recipe, read_task, read_teacher, run_recipe
    from hf_hybrid.training.resume import last_whole_checkpoint
    from hf_hybrid.training.tasks import TASKS

    read = read_recipe(recipe, TASKS if tasks is None else tasks)
    earlier = last_whole_checkpoint(read.output_dir)
    if check:
        task = read_task(read, read_teacher(read))
        _report(task)
        _show_plan(task)
        return
    try:
        folder = run_recipe(read, resume=resume, max_steps=max_steps, tell=_report)
    except KeyboardInterrupt:
        last = last_whole_checkpoint(read.output_dir)
        if last is None or (not resume and last == earlier):
            typer.echo("interrupted before the first checkpoint; the same command starts anew", err=True)
        else:
            steps = [] if max_steps is None else ["--max-steps", str(max_steps)]
            again = shlex.join([*command, str(recipe), *steps])
            typer.echo(f"interrupted; the last whole checkpoint is {last}; go on with: {again}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(f"{folder}\nTry it with: hf-hybrid demo --model {folder}")


def _report(task: Any) -> None:
    """Print a summary of the data to standard error: it names what was left out, and is no result."""
    for line in task.report:
        typer.echo(line, err=True)


def _show_plan(task: Any) -> None:
    """Print one sample of the data with its plan."""
    if task.sample is None:
        typer.echo("no sample has a plan")
        return
    out = console()
    out.print(RichText("A prompt:", style="bold"))
    out.print(RichText(f"{task.sample.prompt}\n"))
    out.print(RichText("Its answer, as it is planned:", style="bold"))
    number = 0
    for piece in task.sample.pieces:
        if isinstance(piece, str):
            out.print(RichText(f"text: {_short(piece)}"), soft_wrap=True)
            continue
        first = number
        for part in piece:
            number += 1
            reads = f" (reads {', '.join(str(first + d + 1) for d in part.depends)})" if part.depends else ""
            line = f"part {number}{reads}: {_short(part.label)} | {_short(part.text)}"
            out.print(RichText(line), soft_wrap=True)


def _short(text: str) -> str:
    """The beginning of a text on one line, escaped."""
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
