"""``HybridTrainer``: the host's Trainer over the joint objective, resumable to the bit."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback

from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.examples import Example
from hf_hybrid.training.objectives import JointObjective
from hf_hybrid.training.optimizer import MuonAdamW

COMPLETE = "complete"
"""Name of the empty file that marks a checkpoint folder as wholly written."""
TERMS = ("clean_loss", "noisy_loss", "clean_accuracy", "noisy_accuracy", "teacher_loss")
"""Of a ``JointLoss``, in the log."""


class IndexedExamples(Dataset[tuple[int, Example]]):
    """``length`` examples drawn by index, so that any place of the stream can be reached at once."""

    def __init__(self, draw: Callable[[int], Example], length: int):
        self.draw, self.length = draw, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, Example]:
        return index, self.draw(index)


class HybridTrainer(Trainer):
    """Trains ``[clean | noisy]`` batches of a ``HybridCollator`` with Muon and AdamW.

    Every loss term is logged (nats per token) and shown in the progress bar; a checkpoint is written every
    ``save_minutes`` and at the end, and ``train(resume_from_checkpoint=last_whole_checkpoint(dir))`` goes on from it as
    if nothing had happened. With a ``teacher`` (a model of the same vocabulary, without gradients), ``teacher_share``
    of the loss on clean rows is the divergence from it.
    """

    args: HybridTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: HybridTrainingArguments,
        *,
        teacher: Any = None,
        teacher_share: float = 0.0,
        **kwargs: Any,
    ):
        optimizer = MuonAdamW(
            model,
            matrix_lr=args.matrix_learning_rate,
            other_lr=args.other_learning_rate,
            weight_decay=args.matrix_weight_decay,
        )
        schedule = LambdaLR(optimizer, lambda step: rate_factor(step, args.max_steps, args.warmup, args.decay_from))
        # Scaling over accumulated batches is left to the mean of the means: every batch holds the same number of rows.
        super().__init__(model, args, optimizers=(optimizer, schedule), **kwargs)
        self.model_accepts_loss_kwargs = False
        teacher = teacher.to(args.device) if teacher is not None else None
        objective: nn.Module = JointObjective(model, args.noisy_weight, teacher, teacher_share)
        self.objective = torch.compile(objective, dynamic=False) if args.compile_objective else objective
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(TermsProgress())
        self.add_callback(CheckpointClock(args.save_minutes))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        data: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(data)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The joint loss of one batch, a scalar; its terms are kept for the log."""
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=bool(self.args.autocast_bfloat16)):
            terms = self.objective(inputs)
        for name in TERMS:
            if (term := getattr(terms, name)) is not None:
                self._terms[name].append(term.detach())
        return (terms.loss, terms) if return_outputs else terms.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The host's log with the mean of every loss term since the last one."""
        if self._terms:
            logs |= {name: round(float(torch.stack(values).mean()), 4) for name, values in self._terms.items()}
            self._terms.clear()
        super().log(logs, *args, **kwargs)


def rate_factor(step: int, max_steps: int, warmup: int, decay_from: float) -> float:
    """Learning-rate factor in (0, 1]: linear warm-up, constant, from ``decay_from * max_steps`` linear to zero."""
    if step < warmup:
        return (step + 1) / warmup
    start = decay_from * max_steps
    return 1.0 if step < start else max((max_steps - step) / max(max_steps - start, 1.0), 1e-3)


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint folder that was written to its end, or None."""
    found = [p for p in output_dir.glob("checkpoint-*") if (p / COMPLETE).exists() and p.name[11:].isdigit()]
    return max(found, key=lambda p: int(p.name[11:]), default=None)


class CheckpointClock(TrainerCallback):
    """Asks for a checkpoint every ``minutes`` and at the end, and marks each one when it is whole."""

    def __init__(self, minutes: float):
        self.minutes, self.last = minutes, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint when it is time."""
        if time.monotonic() - self.last > 60 * self.minutes or state.global_step >= state.max_steps:
            control.should_save = True
            self.last = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The folder is complete: say so inside it."""
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class TermsProgress(ProgressCallback):
    """The host's progress bar with the loss terms behind it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the terms in the bar instead of printing a dict below it."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {k.replace("accuracy", "acc"): v for k, v in logs.items() if k in TERMS}
            self.training_bar.set_postfix(shown)
