"""What is left of a run that broke off: it goes on only from a checkpoint that is whole, and never two runs at once.

Catches: a new run that loses its checkpoints to those of an earlier one, or goes on from them; a broken checkpoint that
ends in a traceback, or is gone on from without its optimiser; a full disk that takes the last good checkpoint, or the
result of an earlier run, along; two runs that write one folder.
"""

from __future__ import annotations

import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

from hf_hybrid.cli import app
from hf_hybrid.locks import InUseError, exclusive
from hf_hybrid.training import recipe as recipes
from hf_hybrid.training.recipe import RecipeError
from hf_hybrid.training.resume import COMPLETE, TrainingError, last_whole_checkpoint, set_aside
from hf_hybrid.training.tasks import Task
from tests.recipes_for_tests import contents, counting_task, fields_of, put, run, written

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


# A full disk. The limit on the size of a file is the system's own, and fails the same calls every time.


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
