"""Going on: only with the same recipe and data, only from a checkpoint that is whole, and never two runs at once.

Catches: old weights behind a new tokenizer, with exit code 0; a harmless change that costs a run; a new run that loses
its checkpoints to those of an earlier one, or goes on from them; a broken checkpoint that ends in a traceback, or is
gone on from without its optimiser; a full disk that takes the last good checkpoint, or the result of an earlier run,
along; two runs that write one folder.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_for_tests import write_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_hybrid.cli import app
from hf_hybrid.locks import InUseError, exclusive
from hf_hybrid.training import recipe as recipes
from hf_hybrid.training.inputs import INPUTS, ResumeError
from hf_hybrid.training.recipe import RecipeError, read_recipe, run_recipe
from hf_hybrid.training.resume import COMPLETE, TrainingError, last_whole_checkpoint, set_aside
from hf_hybrid.training.tasks import Source, Task
from tests.recipes_for_tests import counting_task, fields_of, written

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices that were drawn; registers the task ``counting``."""
    indices: list[int] = []
    monkeypatch.setitem(recipes.TASKS, "counting", counting_task(indices))
    return indices


def run(folder: Path, change: Change = lambda data: None, **options: Any) -> Path:
    """Run the recipe of ``folder`` after ``change``."""
    data = fields_of(folder)
    change(data)
    return run_recipe(read_recipe(written(folder, data)), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def put(section: str, **values: Any) -> Change:
    return lambda data: data[section].update(values)


CHANGED: dict[str, tuple[Change, str]] = {
    "seed": (lambda data: data.update(seed=4), "seed was 3 and is 4"),
    "size": (put("model", hidden_size=64), "model.hidden_size was 32 and is 64"),
    "default left": (put("model", rms_norm_eps=0.5), "model.rms_norm_eps was 1e-06 and is 0.5"),
    "batches": (put("batches", num_rows=72), "batches.num_rows was 64 and is 72"),
    "nested": (put("batches", block_lengths={2: 1}), r"batches.block_lengths was \{'4': 1\} and is \{'2': 1\}"),
    "rate": (put("training", other_learning_rate=1e-4), "training.other_learning_rate was 0.003 and is 0.0001"),
    "longer": (put("training", max_steps=3), "training.max_steps was 2 and is 3"),
    "shorter": (put("training", max_steps=1), "training.max_steps was 2 and is 1"),
    "two": (
        lambda data: (data.update(seed=5), put("training", warmup=9)(data)),
        "seed was 3 .*; training.warmup was 20",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_another_recipe_does_not_go_on(drawn: list[int], tmp_path: Path, case: str) -> None:
    change, message = CHANGED[case]
    run(tmp_path)
    before = contents(tmp_path / "runs")
    with pytest.raises(ResumeError, match=rf"checkpoint-2 was trained from something else: .*{message}.*--no-resume"):
        run(tmp_path, change)
    assert contents(tmp_path / "runs") == before
    drawn.clear()
    run(tmp_path, change, resume=False)
    assert drawn


UNCHANGED: dict[str, Change] = {
    "nothing": lambda data: None,
    "name": lambda data: data.update(name="renamed"),
    "generation": put("generation", max_new_tokens=9),
    "logging and saving": put("training", logging_steps=2, save_minutes=1, save_total_limit=3),
    "workers": put("training", dataloader_num_workers=1),
    "a default written out": lambda data: (put("training", warmup=20)(data), put("model", attention_bias=False)(data)),
    "a whole number as a fraction": put("training", warmup=20.0),
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_what_the_weights_do_not_depend_on_may_change(drawn: list[int], tmp_path: Path, case: str) -> None:
    first = (run(tmp_path) / "model.safetensors").read_bytes()
    drawn.clear()
    again = run(tmp_path, UNCHANGED[case])
    assert drawn == [] and (again / "model.safetensors").read_bytes() == first


def test_max_steps_of_the_call_count(drawn: list[int], tmp_path: Path) -> None:
    run(tmp_path, max_steps=1)
    with pytest.raises(ResumeError, match=r"training.max_steps was 1 and is 2"):
        run(tmp_path)
    drawn.clear()
    run(tmp_path, max_steps=1)
    assert drawn == []


def test_a_checkpoint_that_does_not_say_is_refused(drawn: list[int], tmp_path: Path) -> None:
    run(tmp_path)
    inputs = tmp_path / "runs" / "checkpoint-2" / INPUTS
    for text in ("{", "[]", "{}", '{"recipe": []}'):
        inputs.write_text(text)
        with pytest.raises(ResumeError, match=r"does not say from which recipe and data .*--no-resume"):
            run(tmp_path)
    inputs.unlink()
    with pytest.raises(ResumeError, match="does not say"):
        run(tmp_path)


# Data, tokenizer, teacher.


def samples(path: Path, *texts: str) -> None:
    answer = "# T\n## Leaf\nthe leaves of a {}\n## Cup\nhot water, see Leaf\n"
    lines = [json.dumps({"prompt": f"p{n}", "answer": answer.format(text)}) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines), encoding="utf-8")


WORDS = ("bush", "tree", "herb", "fern", "palm", "reed", "vine", "moss")


def on_lines(path: Path, **more: Any) -> Change:
    """The recipe on a file of samples."""

    def change(data: dict[str, Any]) -> None:
        data.update(task="jsonl", data={"jsonl": str(path), "vocab_size": 600, "held_out": 0.2, **more})
        data["batches"].update(num_rows=200, max_spans=12)

    return change


def test_other_data_do_not_go_on(tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    samples(data, *WORDS)
    run(tmp_path, on_lines(data))
    before = contents(tmp_path / "runs")
    # The same samples elsewhere, and another way of measuring, are the same data.
    data.rename(tmp_path / "moved.jsonl")
    data = tmp_path / "moved.jsonl"
    data.write_bytes(b"\n" + data.read_bytes() + b"\n\n")
    run(tmp_path, on_lines(data, open_answers=True))
    kept = contents(tmp_path / "runs")
    assert kept["tiny/model.safetensors"] == before["tiny/model.safetensors"]
    samples(data, *WORDS[:-1], "rush")  # as long as before
    with pytest.raises(ResumeError, match=r"something else: the data are others .*; the tokenizer is another"):
        run(tmp_path, on_lines(data))
    samples(data, *WORDS, "rush")
    with pytest.raises(ResumeError, match=r"the data are others \(then 6 to train on, 2 held .*; now 7 to train on"):
        run(tmp_path, on_lines(data))
    samples(data, *reversed(WORDS))
    with pytest.raises(ResumeError, match="the data are others"):
        run(tmp_path, on_lines(data))
    samples(data, *WORDS)
    with pytest.raises(ResumeError, match=r"data.held_out was 0.2 and is 0.3"):
        run(tmp_path, on_lines(data, held_out=0.3))
    assert contents(tmp_path / "runs") == kept


def test_another_tokenizer_does_not_go_on(drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)

    def task(source: Source) -> Task:
        made = counting_task([])(source)
        text = made.tokenizer.backend_tokenizer.to_str().replace('"w7":7', '"other":7')
        special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
        other = PreTrainedTokenizerFast(
            tokenizer_object=type(made.tokenizer.backend_tokenizer).from_str(text), **special
        )
        return Task(other, made.draw, made.write_test_set)

    monkeypatch.setitem(recipes.TASKS, "counting", task)
    with pytest.raises(ResumeError, match="something else: the tokenizer is another"):
        run(tmp_path)


def test_another_teacher_does_not_go_on(tmp_path: Path) -> None:
    teacher = write_checkpoint(tmp_path / "teacher")
    data = tmp_path / "own.jsonl"
    samples(data, *WORDS)

    def change(place: Path) -> Change:
        def on_teacher(fields: dict[str, Any]) -> None:
            on_lines(data)(fields)
            fields["teacher"] = {"checkpoint": str(place), "share": 0.5}
            fields["model"]["max_position_embeddings"] = 512

        return on_teacher

    run(tmp_path, change(teacher))
    shutil.copytree(teacher, tmp_path / "copy")
    run(tmp_path, change(tmp_path / "copy"))  # the same one elsewhere
    weights = load_file(teacher / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match="something else: the weights of the teacher are others"):
        run(tmp_path, change(teacher))
    (teacher / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="teacher: cannot load"):
        run(tmp_path, change(teacher))


# Beginning anew.


def test_a_new_run_keeps_its_own_checkpoints(
    drawn: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside those of an earlier run it would lose them to the rotation, and go on from the others."""
    often = put("training", save_minutes=0.0, save_total_limit=1, max_steps=4)
    run(tmp_path, often)
    output = tmp_path / "runs"
    old = contents(output / "checkpoint-4")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        run(tmp_path, often, resume=False, max_steps=2)
    finally:
        logger.removeHandler(caplog.handler)
    assert f"moved to {output / 'earlier-1'}" in caplog.text
    assert last_whole_checkpoint(output) == output / "checkpoint-2"
    assert contents(output / "earlier-1" / "checkpoint-4") == old
    run(tmp_path, often, resume=False, max_steps=1)
    assert (output / "earlier-2" / "checkpoint-2" / COMPLETE).exists()
    assert set_aside(tmp_path) is None


# Broken checkpoints.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    """Change a byte of the largest entry, not of the directory behind."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))


BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated weights": ("model.safetensors", cut, "model.safetensors: "),
    "hostile weights": ("model.safetensors", lambda p: p.write_bytes(b"\xff" * 64), "model.safetensors: "),
    "no weights": ("model.safetensors", Path.unlink, "there are no weights"),
    "half a state": ("trainer_state.json", lambda p: p.write_text("{"), "trainer_state.json is not JSON"),
    "empty state": ("trainer_state.json", lambda p: p.write_text("{}"), "trainer_state.json is not of this step"),
    "a list as state": ("trainer_state.json", lambda p: p.write_text("[]"), "trainer_state.json is not of this step"),
    "no state": ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
    "truncated optimiser": ("optimizer.pt", cut, "optimizer.pt is cut short"),
    "damaged optimiser": ("optimizer.pt", flip, "optimizer.pt is damaged"),
    "no optimiser": ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
    "pickled schedule": (
        "scheduler.pt",
        lambda p: p.write_bytes(b"\x80\x02cos\nsystem\n."),
        "scheduler.pt is cut short",
    ),
    "empty random state": ("rng_state.pth", lambda p: p.write_bytes(b""), "rng_state.pth is cut short"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a recipe and the checkpoints 1 and 2 of its run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.TASKS, "counting", counting_task([]))
        run(folder, put("training", save_minutes=0.0))
        yield folder


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_one_line(whole: Path, tmp_path: Path, case: str) -> None:
    name, spoil, message = BROKEN[case]
    shutil.copytree(whole / "runs", tmp_path / "runs")
    path = written(tmp_path, fields_of(tmp_path))
    spoil(tmp_path / "runs" / "checkpoint-2" / name)
    before = contents(tmp_path / "runs")
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1, (result.output, result.exception)
    assert f"checkpoint-2 is broken ({message}" in result.stderr
    assert "remove it to go on from checkpoint-1, or begin anew with --no-resume" in result.stderr
    assert contents(tmp_path / "runs") == before
    shutil.rmtree(tmp_path / "runs" / "checkpoint-2")
    CliRunner().invoke(app, ["train", str(path)])
    assert last_whole_checkpoint(tmp_path / "runs") == tmp_path / "runs" / "checkpoint-2"


# A full disk. The limit on the size of a file is the system's own, and fails the same calls in the same places.


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["model.safetensors", "optimizer.pt"])
def test_a_disk_that_fills_in_training_costs_no_checkpoint(
    drawn: list[int], tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = put("training", save_minutes=0.0, save_total_limit=1, max_steps=3)
    (tmp_path / "straight").mkdir()
    straight = run(tmp_path / "straight", steps)
    save = recipes.HybridTrainer._save_checkpoint

    def later(self: Any, *args: Any, **kwargs: Any) -> None:
        needed = (tmp_path / "straight" / "runs" / "checkpoint-3" / what).stat().st_size
        with files_up_to(needed - 1 if self.state.global_step == 2 else resource.RLIM_INFINITY):
            save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(recipes.HybridTrainer, "_save_checkpoint", later)
        with pytest.raises(TrainingError, match=r"checkpoint-2 cannot be written .*last good checkpoint is .*-1: make"):
            run(tmp_path, steps)
    output = tmp_path / "runs"
    assert [path.name for path in output.iterdir()] == ["checkpoint-1"]
    drawn.clear()
    result = run(tmp_path, steps)
    assert sorted(drawn)[-1] == 5 and last_whole_checkpoint(output) == output / "checkpoint-3"
    assert (result / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error"), RuntimeError("PytorchStreamWriter failed")],
)
def test_whatever_a_library_calls_it(
    drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run(tmp_path)
    result = contents(tmp_path / "runs" / "tiny")

    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    # The result: the run is over, and what an earlier one left stays whole.
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "save_checkpoint", full)
        with pytest.raises(
            TrainingError, match=r"the result .*tiny cannot be written .*last good .*checkpoint-1: make"
        ):
            run(tmp_path, resume=False, max_steps=1)
    assert contents(tmp_path / "runs" / "tiny") == result
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name.startswith(".")]
    # A checkpoint, from the command line: one line.
    monkeypatch.setattr(torch, "save", full)
    path = written(tmp_path, fields_of(tmp_path))
    told = CliRunner().invoke(app, ["train", str(path), "--no-resume"])
    assert told.exit_code == 1 and "cannot be written" in told.stderr and "no checkpoint was written" in told.stderr
    assert "Traceback" not in told.output


def test_folders_that_cannot_be_written_are_named_before_anything_else(
    drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RecipeError, match=r"output_dir: .*runs cannot be written \(File exists\)"):
        run(tmp_path)
    with pytest.raises(RecipeError, match=r"cannot be written \(Not a directory\)"):
        run(tmp_path, lambda data: data.update(output_dir=str(tmp_path / "runs" / "below")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tiny").write_text("a file")
    with pytest.raises(RecipeError, match="tiny is a file"):
        run(tmp_path, lambda data: data.update(output_dir=str(tmp_path / "other")))
    assert drawn == []

    def denied(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hf_hybrid.training.recipe.exclusive", denied)
    with pytest.raises(RecipeError, match=r"cannot be written \(Permission denied\)"):
        run(tmp_path, lambda data: data.update(output_dir=str(tmp_path / "denied")))


# Two runs.


def test_two_runs_do_not_share_a_folder(drawn: list[int], tmp_path: Path) -> None:
    seen: list[str] = []

    def second(task: Task) -> None:
        with pytest.raises(InUseError, match="runs is in use by another training run: wait"):
            run(tmp_path, resume=False)
        seen.append("refused")
        run(tmp_path, lambda data: data.update(output_dir=str(tmp_path / "others")))

    run(tmp_path, tell=second)
    assert seen == ["refused"] and (tmp_path / "others" / "tiny").is_dir()
    run(tmp_path)  # the lock is gone with the run
    assert not (tmp_path / "runs" / ".lock").exists()
    with exclusive(tmp_path / "runs", "training run"):
        told = CliRunner().invoke(app, ["train", str(written(tmp_path, fields_of(tmp_path)))])
    assert told.exit_code == 1 and len(told.stderr.splitlines()) == 1 and "in use by another" in told.stderr


def test_a_recipe_says_what_its_checkpoints_hold(drawn: list[int], tmp_path: Path) -> None:
    run(tmp_path)
    said = json.loads((tmp_path / "runs" / "checkpoint-2" / INPUTS).read_text())
    assert said["recipe"]["model.hidden_size"] == 32 and said["recipe"]["training.max_steps"] == 2
    assert not {"training.logging_steps", "training.use_cpu", "generation.do_sample", "name"} & set(said["recipe"])
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["training"]["logging_steps"] == 1
