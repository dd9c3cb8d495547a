"""What decides the weights of a run; stored in its checkpoints, so that only a run with the same inputs resumes them.

Resuming with another recipe or other data would mix two runs: old weights behind a new tokenizer, or half a schedule.
What does not matter to the weights (where files are, how often they are saved and logged, what the generation config
says) may change in between.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import LlamaConfig

from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.collators import CollatorSettings

if TYPE_CHECKING:
    from hf_hybrid.training.recipe import Recipe
    from hf_hybrid.training.tasks import Task
    from hf_hybrid.training.teacher import Teacher

INPUTS = "inputs.json"
"""Name of the file in a checkpoint."""

_FREE_PREFIXES = ("log_", "logging_", "save_", "eval_", "hub_", "push_to_", "report_", "run_", "disable_")
_FREE = {
    *(
        "use_cpu",
        "compile_objective",
        "torch_empty_cache_steps",
        "skip_memory_metrics",
        "include_num_input_tokens_seen",
    ),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
}
"""Fields of ``training`` that the weights do not depend on, but for rounding."""

_NOT_INPUTS = {"jsonl", "checkpoint", "open_answers"}
"""Fields of ``data`` and ``teacher`` that name a path (the digests say what is there), or how an answer
is measured."""


class ResumeError(ValueError):
    """A checkpoint that this run cannot go on from; the message says why, and what to do."""


def inputs_of(recipe: Recipe, task: Task, teacher: Teacher | None, max_steps: int) -> dict[str, Any]:
    """Everything that decides the weights: the fields of the recipe, and digests of what it names.

    Args:
        max_steps: of this run; the schedule ends there.
    """
    training = {**recipe.training, "max_steps": max_steps}
    sections: dict[str, Mapping[str, Any]] = {
        "model": recipe.model,
        "batches": asdict(recipe.batches),
        "training": {name: value for name, value in training.items() if not _is_free(name)},
        "data": {} if recipe.data is None else asdict(recipe.data),
        "teacher": {} if recipe.teacher is None else asdict(recipe.teacher),
    }
    named = {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
        if name not in _NOT_INPUTS
    }
    content = {
        "recipe": {"task": recipe.task, "seed": recipe.seed, **named},
        "data": task.content,
        "data_summary": task.report[-1] if task.report else "",
        "tokenizer": _tokenizer_digest(task.tokenizer),
        "teacher": "" if teacher is None else _weights_digest(teacher.model.state_dict()),
    }
    return json.loads(json.dumps(content, default=str))  # as it will be read back


def check_inputs(checkpoint: Path, now: Mapping[str, Any]) -> None:
    """Whether a run with the inputs ``now`` may go on from ``checkpoint``.

    Raises:
        ResumeError: it was trained from others, or does not say from what.
    """
    anew = "begin anew with --no-resume (what is there is kept), or name another output_dir"
    try:
        then = json.loads((checkpoint / INPUTS).read_text(encoding="utf-8"))
        different = differences(then, now)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{checkpoint} does not say from which recipe and data it was trained ({INPUTS} is missing or broken), so "
            f"this run cannot go on from it; {anew}"
        ) from error
    if different:
        raise ResumeError(f"{checkpoint} was trained from something else: {'; '.join(different)}. Undo that, {anew}")


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two results of ``inputs_of``, each in a few words; fields of the recipe one by one."""
    one, two = then["recipe"], now["recipe"]
    found: list[str] = []
    for name in (*one, *(name for name in two if name not in one)):
        before, after = (side.get(name, _default(name)) for side in (one, two))
        if before != after:
            found.append(f"{name} was {before!r} and is {after!r}")
    if then["teacher"] != now["teacher"]:
        found.append("the weights of the teacher are others")
    if then["data"] != now["data"]:
        before, after = then["data_summary"], now["data_summary"]
        found.append("the data are others" + (f" (then {before}; now {after})" if before != after else ""))
    if then["tokenizer"] != now["tokenizer"]:
        found.append("the tokenizer is another")
    return found


def digest(items: Iterable[object]) -> str:
    """Of the texts of ``items``, in their order."""
    sha = hashlib.sha256()
    for item in items:
        text = repr(item).encode("utf-8", "surrogatepass")
        sha.update(len(text).to_bytes(8, "little") + text)
    return sha.hexdigest()


def _is_free(name: str) -> bool:
    return name in _FREE or name.startswith(_FREE_PREFIXES)


def _default(name: str) -> Any:
    """What a field of the recipe is when it is left out."""
    section, _, field = name.partition(".")
    if section == "model":
        return {"rope_theta": 10000.0, "copy_heads": False}.get(field, getattr(LlamaConfig(), field, None))
    if section == "training":
        known = {f.name: f.default for f in fields(HybridTrainingArguments)}
        return None if known.get(field, MISSING) is MISSING else known[field]
    return getattr(CollatorSettings(), field, None) if section == "batches" else None


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest([backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())])


def _weights_digest(weights: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(weights.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        values: Any = value.detach().float().cpu().contiguous().numpy()
        sha.update(values.data)
    return sha.hexdigest()
