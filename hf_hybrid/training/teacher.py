"""A teacher: a trained checkpoint whose distribution a smaller model learns, so that it can draft for it.

Sources: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, for the loss; Zhou et al., "DistillSpec:
Improving Speculative Decoding via Knowledge Distillation", 2024, for distilling a drafter (theirs is trained on texts
of the two models; here on the answers of a recipe, which the teacher would write nearly alike); Sanh et
al., "DistilBERT", 2019, for beginning with layers of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_hybrid.checkpoints import BUNDLED, bundled
from hf_hybrid.fields import REQUIRED, setting
from hf_hybrid.models.vocabulary import knows_tags, width_of


class TeacherError(ValueError):
    """A teacher that cannot be learned from; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """The ``teacher`` section of a recipe."""

    checkpoint: str = setting(REQUIRED, "bundled checkpoint, folder or Hub id of the teacher")
    share: float = setting(
        0.9,
        "weight of the divergence from the teacher in the loss on clean rows; the loss on the text has the rest",
        0.0,
        1.0,
    )
    first_layers: int = setting(
        0, "number of the teacher's first layers that the student begins with; 0: random weights", 0
    )


@dataclass(frozen=True)
class Teacher:
    """A trained model in eval mode, without gradients, and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase


def load_teacher(name: str) -> Teacher:
    """Load a teacher in float32.

    Args:
        name: a bundled checkpoint, a folder, or a Hub id.

    Raises:
        TeacherError: there is none, or a student of its vocabulary could not be trained by a recipe.
    """
    source = str(bundled(name)) if name in BUNDLED and not Path(name).is_dir() else name
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TeacherError(
            f"teacher: cannot load {name!r}: give a bundled checkpoint ({', '.join(BUNDLED)}), a folder with "
            f"config.json, weights and tokenizer, or a Hub id ({first})"
        ) from error
    width = width_of(model)
    if len(tokenizer) != width:
        raise TeacherError(
            f"teacher: {name!r} writes {width} tokens and its tokenizer has {len(tokenizer)}; a student needs the "
            "vocabulary of its tokenizer, so take a checkpoint whose two are equal"
        )
    if not knows_tags(tokenizer):
        raise TeacherError(
            f"teacher: the tokenizer of {name!r} lacks the control tags, and adding them would make another one of "
            "it; take a checkpoint that a recipe has trained"
        )
    return Teacher(model.requires_grad_(False).eval(), tokenizer)


@torch.no_grad()
def begin_as_teacher(student: PreTrainedModel, teacher: Any, layers: int) -> None:
    """Copy the embedding, the first ``layers`` layers, the last norm and the head of ``teacher`` into ``student``.

    Raises:
        TeacherError: the student has another number of layers, or one of another shape.
    """
    own, wanted = student.state_dict(), teacher.state_dict()
    depth = student.config.get_text_config().num_hidden_layers
    if depth != layers:
        raise TeacherError(
            f"teacher: first_layers={layers}, and the model has num_hidden_layers={depth}: make them equal"
        )
    if not getattr(teacher.config.get_text_config(), "tie_word_embeddings", False):
        raise TeacherError(
            "teacher: its head is not its embedding, and a student of a recipe has one matrix for both; "
            "set first_layers: 0"
        )
    differing = [name for name, value in own.items() if name not in wanted or wanted[name].shape != value.shape]
    if differing:
        raise TeacherError(
            f"teacher: {differing[0]} differs in shape from the teacher's, so the student cannot begin with its "
            "layers; set the sizes under model as the teacher has them, or first_layers: 0"
        )
    student.load_state_dict({name: wanted[name] for name in own})
