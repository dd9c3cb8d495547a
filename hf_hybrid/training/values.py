"""Checks of a recipe's values when it is read: the libraries would accept wrong ones and fail hours later, or never."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, LlamaConfig

from hf_hybrid.config import stored_strategy
from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.collators import CollatorSettings
from hf_hybrid.training.layout import Form

_SIZES = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "head_dim"),
}
_COUNTS = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")


def check_names(data: Mapping[str, Any]) -> None:
    """Check ``name``, ``output_dir`` and ``seed`` of a recipe.

    Raises:
        ValueError: one of them cannot be used; so do the functions below.
    """
    name, folder, seed = data["name"], data["output_dir"], data["seed"]
    taken = name in ("", ".", "..", "data") or str(name).startswith(("checkpoint-", "earlier-"))
    if not isinstance(name, str) or taken or "/" in name or "\\" in name:
        raise ValueError(
            f"name: {name!r} must be the name of a folder in output_dir: a text without slashes, other than data, "
            "checkpoint-N and earlier-N"
        )
    if not isinstance(folder, str) or not folder:
        raise ValueError(f"output_dir: {folder!r} must be the path of a folder, a text")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed: {seed!r} must be a whole number from 0 to {2**32 - 1}")


def check_model(section: Mapping[str, Any]) -> None:
    """Check that the sizes make a ``LlamaConfig``."""
    for name in sorted(_SIZES & set(section)):
        if type(section[name]) is not int or section[name] < 1:
            raise ValueError(f"model: {name}={section[name]!r} must be a whole number of at least 1")
    given = {name: value for name, value in section.items() if name not in ("copy_heads", "rope_theta")}
    try:
        LlamaConfig(**given)
        theta = float(section.get("rope_theta", 1.0))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"model: {' '.join(str(error).split())}") from error
    if not theta > 0:
        raise ValueError(f"model: rope_theta={theta} must be greater than 0")


def check_batches(section: Mapping[str, Any]) -> None:
    """Check the types of the ``CollatorSettings``, and that weights can be drawn by."""
    for name, value in section.items():
        if name not in ("forms", "block_lengths"):
            _check_type(f"batches: {name}", value, getattr(CollatorSettings, name))
    forms, lengths = (section.get(name) for name in ("forms", "block_lengths"))
    _check_weights("forms", forms, lambda key: key in get_args(Form), f"of {', '.join(get_args(Form))}")
    _check_weights("block_lengths", lengths, lambda key: type(key) is int and key >= 1, "lengths in tokens, 1 or more")


def check_training(section: Mapping[str, Any]) -> None:
    """Check types of numbers and switches among the ``HybridTrainingArguments``, and that counts are at least one."""
    defaults = {f.name: f.default for f in fields(HybridTrainingArguments)}
    for name, value in section.items():
        _check_type(f"training: {name}", value, defaults[name])
    for name in _COUNTS:
        value = section.get(name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"training: {name}={value!r} must be a whole number of at least 1")


def check_generation(section: Mapping[str, Any]) -> None:
    """Check that the host takes the section as a generation config, and that its strategy exists."""
    try:
        GenerationConfig(**section)
        stored_strategy(section.get("hf_hybrid"))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"generation: {' '.join(str(error).split())}") from error


def _check_type(where: str, value: Any, default: Any) -> None:
    """Check that ``value`` has the type of ``default``, a number or a switch; a whole number is a number too."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{where}={value!r} must be true or false")
    elif isinstance(default, (int, float)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or (isinstance(default, int) and value != int(value)):
            kind = "a whole number" if isinstance(default, int) else "a number (YAML reads 1e-3 as text: write 1.0e-3)"
            raise ValueError(f"{where}={value!r} must be {kind}")


def _check_weights(name: str, weights: Any, fits: Any, choices: str) -> None:
    if weights is None:
        return
    if not isinstance(weights, Mapping) or not weights or not all(fits(key) for key in weights):
        raise ValueError(f"batches: {name}={weights!r} must map some {choices} to weights")
    values = list(weights.values())
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) or v < 0 for v in values) or not sum(values) > 0:
        raise ValueError(f"batches: {name}={weights!r}: weights must be numbers of at least 0, and one greater than 0")
