"""Arguments of the hybrid trainer beyond the host's."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class HybridTrainingArguments(TrainingArguments):
    """The host's ``TrainingArguments`` and what the joint objective needs.

    Differs from the host's defaults: columns are kept (the collator's are not those of ``forward``), nothing is
    reported to outside services, the data order is the index order (exact resume), checkpoints are written by the
    clock.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay False: the collator's columns are ours"}
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
        default=0.55, metadata={"help": "share of the steps after which the rates fall linearly to zero"}
    )
    warmup: int = field(default=20, metadata={"help": "steps of linear warm-up"})
    save_minutes: float = field(default=5.0, metadata={"help": "minutes between checkpoints"})
    autocast_bfloat16: bool = field(
        default=True, metadata={"help": "run the forward pass under bfloat16 autocast, on the CPU too"}
    )
    compile_objective: bool = field(
        default=True, metadata={"help": "compile mask, model and loss as one graph (three times faster)"}
    )
