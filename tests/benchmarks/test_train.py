"""``python -m benchmarks.train``: the recipes whose data the package does not make.

Catches: a task that the command does not know, options that do not reach the run, and a line on how to go on that names
a command which cannot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.data.tasks import factbook_task
from benchmarks.train import train
from hf_hybrid.cli import app as ours
from hf_hybrid.training import recipe as recipes

app = typer.Typer()
app.command()(train)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe of a task of the checkout, whose output folder holds a whole checkpoint."""
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-7" / "complete").touch()
    path = tmp_path / "small.yaml"
    path.write_text(
        f"name: small\ntask: factbook\noutput_dir: {tmp_path / 'out'}\nseed: 0\n"
        "model: {}\nbatches: {}\ntraining: {max_steps: 9}\ngeneration: {}\n"
    )
    return path


def test_its_tasks_are_trained_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(recipe: recipes.Recipe, **options: Any) -> Path:
        seen.update(options, task=recipe.make)
        return recipe.output_dir / recipe.name

    monkeypatch.setattr(recipes, "run_recipe", run)
    result = CliRunner().invoke(app, [str(recipe_file), "--no-resume", "--max-steps", "3"])
    assert result.exit_code == 0 and str(recipe_file.parent / "out" / "small") in result.output
    assert seen.pop("tell") and seen == {"task": factbook_task, "resume": False, "max_steps": 3}


def test_an_interrupted_training_says_how_to_go_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(recipe: recipes.Recipe, **options: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "run_recipe", run)
    result = CliRunner().invoke(app, [str(recipe_file)])
    assert result.exit_code == 130 and f"go on with: python -m benchmarks.train {recipe_file}" in result.output


def test_the_package_alone_says_where_its_task_is(recipe_file: Path) -> None:
    result = CliRunner().invoke(ours, ["train", str(recipe_file)])
    assert result.exit_code == 1 and "python -m benchmarks.train trains on it, in a checkout" in result.output
