"""A lock on a file, so that one run at a time appends to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import typer

from hf_hybrid.cli.command import UsageError
from hf_hybrid.locks import InUseError, exclusive


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Open ``path``, made if there is none, for this process alone; the lock ends with the process.

    A file that was made here and is still empty in the end is removed.

    Raises:
        UsageError: another run has it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(path, "run"))
        except InUseError:
            raise UsageError(f"another run is writing to {path}; wait for its end, or name another file") from None
        except OSError as error:  # a file system that knows no locks
            typer.echo(f"{path} cannot be locked ({error}): start no second run that writes to it", err=True)
        made = not path.exists()
        file = held.enter_context(path.open("a+b"))
        try:
            yield file
        finally:
            if made and os.fstat(file.fileno()).st_size == 0:
                with suppress(OSError):  # Windows cannot remove an open file
                    path.resolve().unlink()
