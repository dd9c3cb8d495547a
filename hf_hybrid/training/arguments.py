"""Arguments of the hybrid trainer, beyond those of the host's."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.utils import logging

from hf_hybrid.models.processor import bfloat16_units

_logger = logging.get_logger(__name__)


@dataclass
class HybridTrainingArguments(TrainingArguments):
    """The host's ``TrainingArguments``, and those that the joint objective needs.

    Differs from the host's defaults: columns are kept (the collator's are not those of ``forward``), nothing is
    reported to outside services, the data order is the index order (exact resume), checkpoints are written by the
    clock.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay False: the collator makes columns that forward() does not take"}
    )
    save_strategy: str = field(default="no", metadata={"help": "checkpoints are written every save_minutes instead"})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "no outside service by default"})
    noisy_weight: float = field(default=1.0, metadata={"help": "weight of the loss on masked noisy rows"})
    matrix_learning_rate: float = field(
        default=6e-3, metadata={"help": "peak rate of Muon, for matrices inside the layers"}
    )
    other_learning_rate: float = field(default=3e-3, metadata={"help": "peak rate of AdamW, for embeddings and norms"})
    matrix_weight_decay: float = field(default=0.05, metadata={"help": "decoupled weight decay of the matrices"})
    decay_from: float = field(
        default=0.55, metadata={"help": "share of the steps after which the rates decay linearly to zero"}
    )
    warmup: int = field(default=20, metadata={"help": "steps of linear warm-up"})
    save_minutes: float = field(default=5.0, metadata={"help": "minutes between checkpoints"})
    autocast_bfloat16: bool | None = field(
        default=None,
        metadata={
            "help": "run the forward pass under bfloat16 autocast; default: on, except on a CPU without bfloat16 "
            "units, where it is four times slower than float32"
        },
    )
    compile_objective: bool = field(
        default=True, metadata={"help": "compile mask, model and loss as one graph (three times faster)"}
    )

    def __post_init__(self) -> None:
        """Run the host's checks, and choose the precision where none was given."""
        super().__post_init__()
        if self.autocast_bfloat16 is None:
            self.autocast_bfloat16 = self.device.type != "cpu" or bfloat16_units() != []
            if not self.autocast_bfloat16:
                _logger.warning("this processor has no bfloat16 units: training runs in float32, slower than with them")
