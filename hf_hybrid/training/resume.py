"""Checkpoints of a run: which are complete and readable, and how those of an earlier run are set aside."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_hybrid.training.inputs import ResumeError

COMPLETE = "complete"
"""Name of the empty file that marks a checkpoint folder as wholly written."""
STATE = "trainer_state.json"
_NEEDED = ("optimizer.pt", "scheduler.pt", STATE)
"""Files of a checkpoint without which the host's Trainer would go on all the same, from another state."""


class TrainingError(ValueError):
    """A run that cannot go on; the message says what is kept, and what to try."""


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint folder that was written to its end, or None."""
    return next(reversed(_whole_checkpoints(output_dir)), None)


def _whole_checkpoints(output_dir: Path) -> list[Path]:
    """Oldest first, by the number of steps."""
    found = [p for p in output_dir.glob("checkpoint-*") if (p / COMPLETE).exists() and p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def kept(output_dir: Path) -> str:
    """Say which checkpoint is left."""
    last = last_whole_checkpoint(output_dir)
    return "no checkpoint was written yet" if last is None else f"the last good checkpoint is {last}"


def check_readable(checkpoint: Path) -> None:
    """Whether the files of a checkpoint are whole, without loading them.

    Raises:
        ResumeError: one is missing or broken.
    """
    try:
        _read_all(checkpoint)
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        older = [path for path in _whole_checkpoints(checkpoint.parent) if path != checkpoint]
        instead = f"remove it to go on from {older[-1].name}" if older else "remove it"
        raise ResumeError(
            f"{checkpoint} is broken ({_first_line(error)}): {instead}, or begin anew with --no-resume"
        ) from error


def _read_all(checkpoint: Path) -> None:
    for name in _NEEDED:
        if not (checkpoint / name).is_file():
            raise ValueError(f"{name} is missing")
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        raise ValueError("there are no weights")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as opened:  # type: ignore[no-untyped-call]
                opened.keys()
        except SafetensorError as error:
            raise ValueError(f"{path.name}: {error}") from error
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{STATE} is not JSON: {error}") from error
    step = state.get("global_step") if isinstance(state, dict) else None
    if step != int(checkpoint.name[11:]):
        raise ValueError(f"{STATE} is not of this step")
    for path in sorted((*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"))):
        try:
            with zipfile.ZipFile(path) as archive:  # as torch writes it, with a checksum of every entry
                spoilt = archive.testzip()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path.name} is cut short, or not what torch writes") from error
        if spoilt is not None:
            raise ValueError(f"{path.name} is damaged")


def set_aside(output_dir: Path) -> Path | None:
    """Move the checkpoints of an earlier run into a folder of their own; returns it, None where there were none.

    Otherwise a new run would take them for its newest, and the rotation of old checkpoints would delete the new ones.
    """
    earlier = sorted(path for path in output_dir.glob("checkpoint-*") if path.is_dir())
    if not earlier:
        return None
    number = 1
    while (output_dir / f"earlier-{number}").exists():
        number += 1
    aside = output_dir / f"earlier-{number}"
    aside.mkdir()
    for path in earlier:
        path.rename(aside / path.name)
    return aside


@contextmanager
def saving(output_dir: Path, what: str) -> Iterator[None]:
    """Turn a full disk and the like into a ``TrainingError`` while a checkpoint or the result is written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError for a write that fails
        raise TrainingError(
            f"{what} cannot be written ({_first_line(error)}); {kept(output_dir)}: make room, or mend what is named "
            "here, and give the same command again"
        ) from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a fresh folder to write into; its files replace those in ``folder`` when all are written."""
    fresh = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        folder.mkdir(exist_ok=True)
        for path in sorted(fresh.iterdir()):
            target = folder / path.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            path.replace(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
