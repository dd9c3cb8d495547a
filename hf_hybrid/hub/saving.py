"""Keeps the strategies where the host alone would lose them: in saved folders, and in those of a training run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hf_hybrid.hub.links import check_target
from hf_hybrid.mixin import causal_model, keep_custom_fields
from hf_hybrid.portable import write_custom_generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments


def save_pretrained(
    model: Any, folder: str | os.PathLike[str], *, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
) -> Path:
    """Save a model and its tokenizer as a repository that writes by every strategy, with this package or without.

    Args:
        model: a causal model, enabled or not. Of a PEFT model the adapter alone is saved, as usual; the base that it is
            loaded on decides how it writes.
        folder: made when it is not there.
        tokenizer: saved beside it.
        **kwargs: for the host's ``save_pretrained``, such as ``max_shard_size="2GB"``.

    Returns:
        The folder.

    Raises:
        TypeError: not a decoder-only model with ``generate()``.
        hf_hybrid.PortableError: the folder has a ``custom_generate/`` that is not hf_hybrid's. Nothing was written.
        LinkError: a file in the folder is a link that leads out of it, as in a Hub cache. Nothing was written.
    """
    host = causal_model(model)
    check_target(Path(folder))
    keep_custom_fields(host)
    if host is model:
        write_custom_generate(folder)
    model.save_pretrained(folder, **kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Path(folder)


class HybridCallback(TrainerCallback):
    """Puts ``custom_generate/`` into every checkpoint of a ``Trainer``, and into its output folder.

    A model that went through ``hf_hybrid.enable()`` saves it by itself; this is for a model that did not.
    ``Trainer(..., callbacks=[HybridCallback()])``
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write before training, so that every push has the folder, and an obstacle shows at once."""
        keep_custom_fields(causal_model(model))
        self._write(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write into the checkpoint of this step."""
        self._write(args, state, f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write into the output folder again, which may have been emptied."""
        self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState, checkpoint: str = "") -> None:
        if state.is_world_process_zero and args.output_dir is not None:
            write_custom_generate(Path(args.output_dir) / checkpoint)
