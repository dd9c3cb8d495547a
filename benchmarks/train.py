"""``python -m benchmarks.train``: ``hf-hybrid train`` for all recipes of this repository."""

from __future__ import annotations

from pathlib import Path

import typer

from benchmarks.data.tasks import EVERY_TASK
from hf_hybrid.cli.command import guarded
from hf_hybrid.cli.train import Check, MaxSteps, Recipe, Resume, run


@guarded
def train(
    recipe: Recipe = Path("recipes/pocket.yaml"),
    *,
    resume: Resume = True,
    max_steps: MaxSteps = None,
    check: Check = False,
) -> None:
    """Train the checkpoint that RECIPE describes, on the data of this repository or on your own.

    Ctrl-C is safe: the same command goes on from the last whole checkpoint.
    """
    command = ("python", "-m", "benchmarks.train")
    run(recipe, resume=resume, max_steps=max_steps, check=check, tasks=EVERY_TASK, command=command)


if __name__ == "__main__":
    typer.run(train)
