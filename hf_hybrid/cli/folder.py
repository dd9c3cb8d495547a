"""Checks of a checkpoint folder before the host reads it: anybody may have written it."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model"
PICKLED = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_BYTES = 1 << 28
"""Of an index: the largest models have some hundred thousand tensors, of a hundred bytes each."""


class LoadingError(ValueError):
    """A model that cannot be loaded; the message says what is wrong with which file."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that makes the host read a pickle, which may run code, or a file outside of it.

    Raises:
        LoadingError: with the name of the file, and what to do.
    """
    if (folder / "adapter_config.json").is_file():
        if not (folder / f"{ADAPTER}.safetensors").is_file() and (folder / f"{ADAPTER}.bin").is_file():
            raise LoadingError(_pickled(f"{ADAPTER}.bin"))
        return
    if (folder / WEIGHTS).is_file():
        return
    if (folder / INDEX).is_file():
        _check_index(folder / INDEX)
        return
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    raise LoadingError(_pickled(pickled[0]) if pickled else f"there are no weights: no {WEIGHTS}, and no {INDEX}")


def _check_index(path: Path) -> None:
    """Check that the index of a checkpoint in several files names safetensors files beside it."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise LoadingError(f"{path.name} has more than {MAX_BYTES} bytes")
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, LoadingError):
            raise
        raise LoadingError(f"{path.name} is no JSON file ({error})") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise LoadingError(f'{path.name} has no "weight_map" that names a file for every tensor')
    for name in sorted(set(files.values())):
        if Path(name).name != name or "\\" in name:
            raise LoadingError(f"{path.name} names {name!r}, which is not beside it")
        if not name.endswith(".safetensors"):
            raise LoadingError(_pickled(name))
        if not (path.parent / name).is_file():
            raise LoadingError(f"{path.name} names {name!r}, which is not there; download it again")


def _pickled(name: str) -> str:
    return (
        f"{name} is a pickle, which can run any code when it is read; if you trust where it comes from, convert it: "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
    )
