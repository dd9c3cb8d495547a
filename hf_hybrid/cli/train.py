"""``hf-hybrid train``: from a recipe to a checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hf_hybrid.cli.command import INTERRUPTED, UsageError


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the recipe.")] = Path("recipes/pocket.yaml"),
    *,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from the last whole checkpoint, if there is one.")
    ] = True,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps.")] = None,
) -> None:
    """Train the checkpoint that RECIPE describes.

    Ctrl-C is safe: the same command goes on from the last whole checkpoint.
    """
    if not recipe.is_file():
        raise UsageError(f"there is no recipe {recipe}; the source repository has recipes/pocket.yaml")
    from hf_hybrid.training.recipe import read_recipe, run_recipe
    from hf_hybrid.training.trainer import last_whole_checkpoint

    read = read_recipe(recipe)
    try:
        folder = run_recipe(read, resume=resume, max_steps=max_steps)
    except KeyboardInterrupt:
        last = last_whole_checkpoint(read.output_dir)
        if last is None:
            typer.echo("interrupted before the first checkpoint; the same command starts anew", err=True)
        else:
            steps = [] if max_steps is None else ["--max-steps", str(max_steps)]
            again = shlex.join(["hf-hybrid", "train", str(recipe), *steps])
            typer.echo(f"interrupted; the last whole checkpoint is {last}; go on with: {again}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(f"{folder}\nTry it with: hf-hybrid demo --model {folder}")
