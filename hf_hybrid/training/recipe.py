"""Recipes: one YAML file that leads from data to a checkpoint as it is stored on the Hub."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_hybrid.config import SettingsError
from hf_hybrid.core.tokens import ControlTokens
from hf_hybrid.fields import checked
from hf_hybrid.locks import exclusive
from hf_hybrid.models.vocabulary import prepare_vocabulary
from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.collators import CollatorSettings, HybridCollator
from hf_hybrid.training.initialisation import start_with_copy_heads
from hf_hybrid.training.inputs import check_inputs, inputs_of
from hf_hybrid.training.resume import check_readable, last_whole_checkpoint, replacing, saving, set_aside
from hf_hybrid.training.tasks import DATA, TASKS, Maker, Source, Task
from hf_hybrid.training.teacher import Teacher, TeacherSettings, begin_as_teacher, load_teacher
from hf_hybrid.training.trainer import HybridTrainer, IndexedExamples
from hf_hybrid.training.values import check_batches, check_generation, check_model, check_names, check_training

_logger = logging.get_logger(__name__)

_SET_HERE = {
    "model": {"vocab_size", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"},
    "training": {"output_dir", "seed"},
    "generation": {"eos_token_id", "pad_token_id"},
}
"""Fields that the recipe's other entries or its task decide."""

IN_THE_CHECKOUT = ("factbook", "wordnet")
"""Tasks whose data are made by the checkout of this repository (``benchmarks/data``)."""

TEST_SET = "test_set.jsonl"
"""Held-out prompts beside the weights."""


MODEL_FIELDS: frozenset[str] = frozenset(
    {f.name for f in fields(LlamaConfig)} - _SET_HERE["model"] | {"copy_heads", "rope_theta"}
)
"""Fields of a ``LlamaConfig`` that a recipe may set, ``rope_theta``, and ``copy_heads`` (True: start with them)."""


_CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "model": check_model,
    "batches": check_batches,
    "training": check_training,
    "generation": check_generation,
}
"""Section of a recipe -> the check of its values."""


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the field."""


@dataclass(frozen=True)
class Recipe:
    """A training recipe, as written in its YAML file.

    Attributes:
        name: of the checkpoint. task: name of the task that makes its data. output_dir: for checkpoints and the result.
        seed: of everything. model: ``MODEL_FIELDS``. batches: ``CollatorSettings``. training:
            ``HybridTrainingArguments``. generation: what goes into ``generation_config.json``.
        data: settings of the task's data (a class of ``DATA``); None for a task without any.
        make: the task's maker; no field of the file.
        teacher: the model to learn from, whose tokenizer is used too; None: the data alone.
    """

    name: str
    task: str
    output_dir: Path
    seed: int
    model: Mapping[str, Any]
    batches: CollatorSettings
    training: Mapping[str, Any]
    generation: Mapping[str, Any]
    make: Maker
    data: Any = None
    teacher: TeacherSettings | None = None


_FIELDS = tuple(f.name for f in fields(Recipe) if f.name != "make")


def read_recipe(path: Path, tasks: Mapping[str, Maker] = TASKS) -> Recipe:
    """Read and check a recipe file; a wrong field is a ``RecipeError`` that lists the choices.

    Args:
        tasks: name -> maker of the data, for the tasks that a recipe may name.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the fields {', '.join(_FIELDS)}")
    _check_keys(data, set(_FIELDS), f"{path}", optional={"data", "teacher"})
    if str(data["task"]) not in tasks:
        moved = "; python -m benchmarks.train trains on it, in a checkout" if data["task"] in IN_THE_CHECKOUT else ""
        raise RecipeError(f"{path}: unknown task {data['task']!r}; choose one of {', '.join(tasks)}{moved}")
    training = {f.name for f in fields(HybridTrainingArguments) if f.init} - _SET_HERE["training"]
    generation = {n for n in vars(GenerationConfig()) if n[0] != "_"} - _SET_HERE["generation"] | {"hf_hybrid"}
    _check_keys(data["model"], set(MODEL_FIELDS), f"{path}: model")
    _check_keys(data["batches"], {f.name for f in fields(CollatorSettings)}, f"{path}: batches")
    _check_keys(data["training"], training, f"{path}: training")
    _check_keys(data["generation"], generation, f"{path}: generation")
    if "max_steps" not in data["training"]:
        raise RecipeError(f"{path}: training: missing field 'max_steps'")
    try:
        check_names(data)
        for name, check in _CHECKS.items():
            check(data[name])
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    return Recipe(
        name=data["name"],
        task=data["task"],
        output_dir=Path(data["output_dir"]),
        seed=data["seed"],
        model=data["model"],
        batches=CollatorSettings(**data["batches"]),
        training=data["training"],
        generation=data["generation"],
        make=tasks[data["task"]],
        data=_read_data(data, path),
        teacher=_checked(TeacherSettings, data["teacher"], f"{path}: teacher") if "teacher" in data else None,
    )


def _read_data(recipe: Mapping[str, Any], path: Path) -> Any:
    """The checked ``data`` section of a recipe; None when its task has none."""
    section, kind = recipe.get("data", {}), DATA.get(str(recipe["task"]))
    if kind is None:
        if section:
            raise RecipeError(f"{path}: data: the task {recipe['task']!r} has no settings here; remove the section")
        return None
    return _checked(kind, section, f"{path}: data")


def _checked(kind: type, section: Any, where: str) -> Any:
    """The settings dataclass ``kind`` from a section of a recipe."""
    if not isinstance(section, Mapping):
        raise RecipeError(f"{where}: must be a mapping of fields to values, got {section!r}")
    try:
        return checked(kind, section)
    except SettingsError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_keys(data: Any, known: set[str], where: str, optional: set[str] | None = None) -> None:
    """``data`` is a mapping with ``known`` keys alone, and with all but the ``optional`` ones (None: all may be
    missing); else ``RecipeError``.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: must be a mapping of fields to values ({{}} for none), got {data!r}")
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(sorted(known))}"
            raise RecipeError(f"{where}: unknown field {key!r}{hint}")
    missing = known - set(data) - (known if optional is None else optional)
    if missing:
        raise RecipeError(f"{where}: missing field {sorted(missing)[0]!r}")


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, teacher: Any = None
) -> tuple[PreTrainedModel, ControlTokens]:
    """Make a model for the tokenizer, with the ids of the control tokens in its config; it begins with the first
    layers of ``teacher`` if the recipe says so."""
    shape = dict(recipe.model)
    copy_heads = bool(shape.pop("copy_heads", False))
    eos: Any = tokenizer.eos_token_id
    pad: Any = tokenizer.pad_token_id
    theta = float(shape.pop("rope_theta", 10000.0))
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        **shape,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, **recipe.generation)
    control = prepare_vocabulary(model, tokenizer)
    if copy_heads:
        start_with_copy_heads(model, recipe.seed)
    if teacher is not None and recipe.teacher is not None and recipe.teacher.first_layers:
        begin_as_teacher(model, teacher, recipe.teacher.first_layers)
    return model, control


def read_teacher(recipe: Recipe) -> Teacher | None:
    """The teacher of a recipe; None when it has none."""
    return load_teacher(recipe.teacher.checkpoint) if recipe.teacher is not None else None


def read_task(recipe: Recipe, teacher: Teacher | None = None) -> Task:
    """Fetch or read the data of a recipe and annotate them, in tokens of the ``teacher`` if there is one."""
    positions = int(recipe.model.get("max_position_embeddings", LlamaConfig().max_position_embeddings))
    tokenizer = teacher.tokenizer if teacher is not None else None
    folder = recipe.output_dir / "data"
    return recipe.make(Source(folder, recipe.seed, recipe.data, recipe.batches, positions, tokenizer))


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = True,
    max_steps: int | None = None,
    tell: Callable[[Task], None] | None = None,
) -> Path:
    """Train and save; returns the folder of the finished checkpoint.

    ``tell`` is called with the task before the training begins.

    With ``resume``, an interrupted run goes on from its last complete checkpoint if the recipe and its data are
    unchanged; without, earlier checkpoints are set aside. The result is in ``output_dir / name``: bfloat16 safetensors,
    tokenizer, generation config, held-out prompts, and ``training.json``.

    Raises:
        RecipeError: ``output_dir`` cannot be written. TaskError, TeacherError: of the data and the teacher.
        ResumeError: the last whole checkpoint is broken, or was trained from something else.
        TrainingError: the loss is not finite, or a checkpoint or the result cannot be written.
        InUseError: another run is at work in ``output_dir``.
    """
    folder = recipe.output_dir / recipe.name
    try:
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"output_dir: {folder} is a file, and the result would be a folder of that name")
        lock = ExitStack()
        lock.enter_context(exclusive(recipe.output_dir, "training run"))
    except OSError as error:
        raise RecipeError(f"output_dir: {recipe.output_dir} cannot be written ({error.strerror})") from error
    with lock:
        return _run(recipe, folder, resume, max_steps, tell)


def _run(
    recipe: Recipe, folder: Path, resume: bool, max_steps: int | None, tell: Callable[[Task], None] | None
) -> Path:
    """``run_recipe``, alone in its folder."""
    output = recipe.output_dir
    teacher = read_teacher(recipe)
    taught: Any = teacher.model if teacher is not None else None
    task = read_task(recipe, teacher)
    if tell is not None:
        tell(task)
    options = dict(recipe.training)
    if max_steps is not None:
        options["max_steps"] = max_steps
    made_from = inputs_of(recipe, task, teacher, options["max_steps"])
    last = last_whole_checkpoint(output) if resume else None
    if last is not None:
        check_readable(last)
        check_inputs(last, made_from)
    model, control = build_model(recipe, task.tokenizer, taught)
    arguments = HybridTrainingArguments(output_dir=str(output), seed=recipe.seed, **options)
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps
    trainer = HybridTrainer(
        model,
        arguments,
        train_dataset=IndexedExamples(task.draw, arguments.max_steps * per_step),
        data_collator=HybridCollator(control, model.config.pad_token_id, recipe.batches, recipe.seed),
        processing_class=task.tokenizer,
        teacher=taught,
        teacher_share=recipe.teacher.share if recipe.teacher is not None else 0.0,
        made_from=made_from,
    )
    if last is None and (earlier := set_aside(output)) is not None:
        _logger.warning(f"the checkpoints of an earlier run were moved to {earlier}")
    result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    history = [entry for entry in trainer.state.log_history if "clean_loss" in entry]
    summary = {"recipe": recipe.name, "steps": result.global_step, "metrics": result.metrics, "history": history}
    with saving(output, f"the result {folder}"), replacing(folder) as fresh:
        save_checkpoint(model, task.tokenizer, fresh)
        task.write_test_set(fresh / TEST_SET)
        (fresh / "training.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return folder


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save weights in bfloat16, config, generation config and tokenizer, as they are stored on the Hub."""
    model.config.use_cache = True  # the host's Trainer switches it off in the config
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
