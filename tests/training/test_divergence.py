"""Training that ends in no numbers: it stops there, says where, and what was good before stays.

Catches: a loss that is NaN or infinite and runs on to the end, whose weights are saved as the result; a checkpoint of
weights that are no numbers, which every later run would go on from; an error that does not say at which step; a
teacher whose own weights are to blame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_for_tests import write_checkpoint
from models_for_tests import tiny
from safetensors.torch import load_file, save_file
from training_examples import CONTROL, PAD, TWO_ROUNDS, TWO_STEPS
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_hybrid.cli import app
from hf_hybrid.training import recipe as recipes
from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.collators import CollatorSettings, HybridCollator
from hf_hybrid.training.recipe import read_recipe, run_recipe
from hf_hybrid.training.recipes.sheets import Sheet
from hf_hybrid.training.recipes.tokenizer import SheetEncoder
from hf_hybrid.training.resume import TrainingError, last_whole_checkpoint
from hf_hybrid.training.tasks import Source, Task
from hf_hybrid.training.trainer import HybridTrainer, IndexedExamples
from tests.recipes_for_tests import counting_task, fields_of, written

COLLATOR = HybridCollator(CONTROL, PAD, CollatorSettings(num_rows=90, max_spans=12, block_lengths={4: 1.0}))


def trainer(folder: Path, steps: int = 6, callback: TrainerCallback | None = None, **changes: Any) -> HybridTrainer:
    options: dict[str, Any] = {**TWO_STEPS, "max_steps": steps, "save_minutes": 0.0, "warmup": 1}
    arguments = HybridTrainingArguments(output_dir=str(folder), **{**options, **changes})
    data = IndexedExamples(lambda index: TWO_ROUNDS, 2 * steps * arguments.gradient_accumulation_steps)
    callbacks = [callback] if callback is not None else None
    return HybridTrainer(
        tiny("llama").float(), arguments, train_dataset=data, data_collator=COLLATOR, callbacks=callbacks
    )


class Spoil(TrainerCallback):
    """Puts ``value`` into a weight before the step ``at``, or into every gradient of that step."""

    def __init__(self, value: float, at: int, gradient: bool = False):
        self.value, self.at, self.gradient = value, at, gradient

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.at - 1 and not self.gradient:
            model.model.norm.weight.data[0] = self.value

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.at - 1 and self.gradient:
            model.model.norm.weight.grad[0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_first_loss_that_is_no_number_ends_the_run(tmp_path: Path, value: float, micro_batches: int) -> None:
    run = trainer(tmp_path, callback=Spoil(value, at=4), gradient_accumulation_steps=micro_batches)
    message = (
        r"step 4: the loss is nan \(clean_loss nan, noisy_loss nan\).*last good checkpoint is .*checkpoint-3\. Try"
    )
    with pytest.raises(TrainingError, match=message) as caught:
        run.train()
    assert run.state.global_step == 3 and "learning_rate" in str(caught.value) and "--no-resume" in str(caught.value)
    assert "teacher" not in str(caught.value)
    last = last_whole_checkpoint(tmp_path)
    assert last == tmp_path / "checkpoint-3"
    assert all(torch.isfinite(weight).all() for weight in load_file(last / "model.safetensors").values())


@pytest.mark.parametrize("at", [2, 3])  # in the middle, and in the last step, behind which there is no loss any more
def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, at: int) -> None:
    run = trainer(tmp_path, steps=3, callback=Spoil(float("nan"), at, gradient=True), max_grad_norm=0.0)
    with pytest.raises(TrainingError, match=rf"step {at}: weights are not finite .* is .*checkpoint-{at - 1}\. Try"):
        run.train()
    assert last_whole_checkpoint(tmp_path) == tmp_path / f"checkpoint-{at - 1}"
    assert not (tmp_path / f"checkpoint-{at}").exists()


def test_without_a_checkpoint_in_between_the_next_loss_ends_the_run(tmp_path: Path) -> None:
    options = {"max_grad_norm": 0.0, "save_minutes": 1e9}
    run = trainer(tmp_path, callback=Spoil(float("nan"), at=2, gradient=True), **options)
    with pytest.raises(TrainingError, match=r"step 3: the loss is nan .*no checkpoint was written yet"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_from_the_command_line_it_is_one_error_and_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that no model survives."""
    monkeypatch.setitem(recipes.TASKS, "counting", counting_task([]))
    fields = fields_of(tmp_path)
    fields["training"].update(max_steps=30, warmup=0, other_learning_rate=1e30, matrix_learning_rate=1e30)
    fields["training"]["disable_tqdm"] = False  # the error is on a line of its own, behind the bar
    told = CliRunner().invoke(app, ["train", str(written(tmp_path, fields))])
    assert told.exit_code == 1 and "Traceback" not in told.output, told.exception
    last = told.stderr.splitlines()[-1]
    assert last.startswith("error: step ") and "training stops here" in last and "Try it with" not in told.output
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_broken_teacher_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = write_checkpoint(tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})

    def task(source: Source) -> Task:
        tokenizer = source.make_tokenizer(["never"], ())
        encode = SheetEncoder(tokenizer)
        return Task(tokenizer, lambda index: encode(Sheet(f"green {index}", ("red",), ("one",))), lambda path: 0)

    monkeypatch.setitem(recipes.TASKS, "counting", task)
    fields = fields_of(tmp_path) | {"teacher": {"checkpoint": str(teacher), "share": 0.5}}
    fields["batches"] = {"num_rows": 200, "max_spans": 1, "forms": {"plain": 1}, "noisy_rows": False}
    fields["model"]["max_position_embeddings"] = 512
    with pytest.raises(
        TrainingError, match=r"step 1: the loss is nan .*teacher_loss nan; the weights of the teacher may"
    ):
        run_recipe(read_recipe(written(tmp_path, fields)))
    assert not (tmp_path / "runs" / "tiny").exists()
