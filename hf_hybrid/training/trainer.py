"""``HybridTrainer``: the host's Trainer over the joint objective, resumable to the bit."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback

from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.examples import Example
from hf_hybrid.training.inputs import INPUTS
from hf_hybrid.training.objectives import JointLoss, JointObjective
from hf_hybrid.training.optimizer import MuonAdamW
from hf_hybrid.training.resume import COMPLETE, TrainingError, kept, saving

TERMS = ("clean_loss", "noisy_loss", "clean_accuracy", "noisy_accuracy", "teacher_loss")
"""Fields of a ``JointLoss`` that are logged."""


class IndexedExamples(Dataset[tuple[int, Example]]):
    """``length`` examples drawn by index, so that the stream can be entered at any index."""

    def __init__(self, draw: Callable[[int], Example], length: int):
        self.draw, self.length = draw, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, Example]:
        return index, self.draw(index)


class HybridTrainer(Trainer):
    """Trains ``[clean | noisy]`` batches of a ``HybridCollator`` with Muon and AdamW.

    Every loss term is logged (nats per token) and shown in the progress bar; a checkpoint is written every
    ``save_minutes`` and at the end, and ``train(resume_from_checkpoint=last_whole_checkpoint(dir))`` resumes it as
    if nothing had happened. With a ``teacher`` (a model of the same vocabulary, without gradients), ``teacher_share``
    of the loss on clean rows is the divergence from it. ``made_from`` is written into every checkpoint
    (``hf_hybrid.training.inputs``).

    Raises:
        TrainingError: while it trains: the loss is not finite, or a checkpoint cannot be written.
    """

    args: HybridTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: HybridTrainingArguments,
        *,
        teacher: Any = None,
        teacher_share: float = 0.0,
        made_from: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        optimizer = MuonAdamW(
            model,
            matrix_lr=args.matrix_learning_rate,
            other_lr=args.other_learning_rate,
            weight_decay=args.matrix_weight_decay,
        )
        schedule = LambdaLR(optimizer, lambda step: rate_factor(step, args.max_steps, args.warmup, args.decay_from))
        # The loss over accumulated batches is the mean of their means: every batch holds the same number of rows.
        super().__init__(model, args, optimizers=(optimizer, schedule), **kwargs)
        self.model_accepts_loss_kwargs = False
        teacher = teacher.to(args.device) if teacher is not None else None
        objective: nn.Module = JointObjective(model, args.noisy_weight, teacher, teacher_share)
        self.objective = torch.compile(objective, dynamic=False) if args.compile_objective else objective
        self.made_from = made_from
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(TermsProgress())
        self.add_callback(CheckpointClock(args.save_minutes))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        data: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(data)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the host does; a run that fails also closes its progress bar."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TermsProgress) and callback.training_bar is not None:
                    callback.training_bar.close()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The joint loss of one batch, a scalar; its terms are kept for the log."""
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=bool(self.args.autocast_bfloat16)):
            terms = self.objective(inputs)
        for name in TERMS:
            if (term := getattr(terms, name)) is not None:
                self._terms[name].append(term.detach())
        if not bool(torch.isfinite(terms.loss)):
            raise self._diverged(self.state.global_step + 1, _told(terms))
        return (terms.loss, terms) if return_outputs else terms.loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write the host's checkpoint with the inputs of the run, and mark it when it is complete.

        Weights that are not finite are not saved, and a checkpoint that could not be completed is removed.
        """
        model: Any = self.model
        if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
            raise self._diverged(self.state.global_step, "weights are not finite any more")
        if not self.args.should_save:  # another process writes
            return super()._save_checkpoint(*args, **kwargs)
        output = Path(str(self.args.output_dir))
        folder = output / f"checkpoint-{self.state.global_step}"
        try:
            with saving(output, str(folder)):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / COMPLETE).unlink(missing_ok=True)
                if self.made_from is not None:
                    (folder / INPUTS).write_text(json.dumps(self.made_from, indent=1) + "\n", encoding="utf-8")
                super()._save_checkpoint(*args, **kwargs)
                (folder / COMPLETE).touch()
        except TrainingError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _diverged(self, step: int, what: str) -> TrainingError:
        """The error of a run whose loss or weights are not finite."""
        return TrainingError(
            f"step {step}: {what}; training stops here, and {kept(Path(str(self.args.output_dir)))}. Try smaller "
            "matrix_learning_rate and other_learning_rate, a longer warmup, a smaller max_grad_norm, or "
            "autocast_bfloat16: false, and begin anew with --no-resume"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The host's log with the mean of every loss term since the last one."""
        if self._terms:
            logs |= {name: round(float(torch.stack(values).mean()), 4) for name, values in self._terms.items()}
            self._terms.clear()
        super().log(logs, *args, **kwargs)


def _told(terms: JointLoss) -> str:
    """Say what the terms of a loss that is not finite are."""
    found = {name: getattr(terms, name) for name in TERMS if name.endswith("loss")}
    values = {name: value.item() for name, value in found.items() if value is not None}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    own = all(math.isfinite(value) for name, value in values.items() if name != "teacher_loss")
    whose = "; the weights of the teacher may be broken" if "teacher_loss" in values and own else ""
    return f"the loss is {terms.loss.item():.4g} ({shown}{whose})"


def rate_factor(step: int, max_steps: int, warmup: int, decay_from: float) -> float:
    """Learning-rate factor in (0, 1]: linear warm-up, constant, from ``decay_from * max_steps`` linear to zero."""
    if step < warmup:
        return (step + 1) / warmup
    start = decay_from * max_steps
    return 1.0 if step < start else max((max_steps - step) / max(max_steps - start, 1.0), 1e-3)


class CheckpointClock(TrainerCallback):
    """Asks for a checkpoint every ``minutes`` and at the end."""

    def __init__(self, minutes: float):
        self.minutes, self.last = minutes, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint when it is time."""
        if time.monotonic() - self.last > 60 * self.minutes or state.global_step >= state.max_steps:
            control.should_save = True
            self.last = time.monotonic()


class TermsProgress(ProgressCallback):
    """The host's progress bar with the loss terms behind it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the terms in the bar instead of printing a dict below it."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {k.replace("accuracy", "acc"): v for k, v in logs.items() if k in TERMS}
            self.training_bar.set_postfix(shown)
