"""Checkpoints that are shipped in the wheel, each a folder as it would lie on the Hub."""

from __future__ import annotations

from pathlib import Path

BUNDLED: dict[str, str] = {
    "hybrid-pocket": "5.2 M parameters; reads a country's record and writes its fact sheet",
}
"""Name -> what it is. The folder of that name lies beside this file."""


class CheckpointError(ValueError):
    """A checkpoint that is not shipped; the message lists those that are."""


def bundled(name: str) -> Path:
    """The folder of a shipped checkpoint.

    Raises:
        CheckpointError: no such checkpoint, or its folder is missing from this installation.
    """
    if name not in BUNDLED:
        raise CheckpointError(f"no bundled checkpoint {name!r}; choose one of {', '.join(BUNDLED)}")
    folder = Path(__file__).parent / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"the bundled checkpoint {name!r} is missing from this installation ({folder}); "
            "install the wheel, or train it in a checkout: python -m benchmarks.train recipes/pocket.yaml"
        )
    return folder
