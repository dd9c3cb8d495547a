"""``hf-hybrid train``: its options, what it shows of a file, how it ends.

Bugs these tests catch: an option that does not reach the run; ``--check`` that trains; an interrupt that does not say
how to go on; a traceback for a wrong recipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_hybrid.training import recipe as recipes
from tests.cli_for_tests import call


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe whose output folder holds one whole checkpoint and one that is not."""
    output = tmp_path / "out"
    for step, whole in ((7, True), (9, False)):
        (output / f"checkpoint-{step}").mkdir(parents=True)
        if whole:
            (output / f"checkpoint-{step}" / "complete").touch()
    path = tmp_path / "small.yaml"
    path.write_text(
        f"name: small\ntask: jsonl\ndata: {{jsonl: own.jsonl}}\noutput_dir: {output}\nseed: 0\n"
        "model: {}\nbatches: {}\ntraining: {max_steps: 9}\ngeneration: {}\n"
    )
    return path


def trained(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Path]) -> None:
    monkeypatch.setattr(recipes, "run_recipe", run)


def test_train_passes_its_options_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(recipe: recipes.Recipe, **options: Any) -> Path:
        seen.update(options, name=recipe.name)
        return recipe.output_dir / recipe.name

    trained(monkeypatch, run)
    assert str(recipe_file.parent / "out" / "small") in call("train", recipe_file).output
    assert callable(seen.pop("tell"))
    assert seen == {"name": "small", "resume": True, "max_steps": None}
    call("train", recipe_file, "--no-resume", "--max-steps", 3)
    assert callable(seen.pop("tell"))
    assert seen == {"name": "small", "resume": False, "max_steps": 3}


def test_train_check_shows_what_a_file_holds(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = recipe_file.parent / "own.jsonl"
    answer = "# T\n## Leaf\nthe leaves of a bush\n## Cup\nhot water, see Leaf\n"
    rows = [json.dumps({"prompt": f"p{n}", "answer": answer}) for n in range(8)]
    data.write_text("\n".join([*rows, "{", "{"]))
    recipe = recipe_file.read_text().replace("own.jsonl", f"{data}, vocab_size: 600")
    recipe_file.write_text(recipe)
    trained(monkeypatch, lambda *_, **__: pytest.fail("--check trained"))
    result = call("train", recipe_file, "--check")
    assert result.stderr.splitlines()[:2] == [
        "8 samples, 8 of them with a plan: 16 parts, 8 of which read earlier parts",
        "2 left out: not JSON (lines 9, 10)",
    ]
    assert result.stdout.splitlines()[-3:] == [
        r'text: "# T\n"',
        r'part 1: "## Leaf\n" | "the leaves of a bush\n"',
        r'part 2 (reads 1): "## Cup\n" | "hot water, see Leaf\n"',
    ]
    data.write_text("{}\n")
    assert "too few samples to train on" in call("train", recipe_file, "--check", code=1).stderr


def test_an_interrupted_training_says_how_to_go_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(recipe: recipes.Recipe, **options: Any) -> Path:
        raise KeyboardInterrupt

    trained(monkeypatch, run)
    text = call("train", recipe_file, "--max-steps", 30, code=130).output
    assert "checkpoint-7" in text and f"hf-hybrid train {recipe_file} --max-steps 30" in text
    (recipe_file.parent / "out" / "checkpoint-7" / "complete").unlink()
    assert "before the first checkpoint" in call("train", recipe_file, code=130).output


def test_a_wrong_recipe_is_one_line(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("seed", "sed"))
    result = call("train", recipe_file, code=1)
    assert "did you mean 'seed'" in result.stderr and len(result.stderr.splitlines()) == 1
