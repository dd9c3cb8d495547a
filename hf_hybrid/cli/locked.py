"""A file that one run at a time appends to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import typer

from hf_hybrid.cli.command import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """``path``, made if there is none, for this process alone; the lock ends with the process, however it ends.

    The file itself is locked, so that a link to it is no way around. A file that was made here and is still empty in
    the end is taken away again.

    Raises:
        UsageError: another run has it.
    """
    made = not path.exists()
    with path.open("a+b") as file, _lock(path, file):
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            raise UsageError(f"{path} was taken away while it was opened; start again")
        try:
            yield file
        finally:
            if made and os.fstat(file.fileno()).st_size == 0:
                with suppress(OSError):  # Windows takes no open file away
                    path.resolve().unlink()


@contextmanager
def _lock(path: Path, file: BinaryIO) -> Iterator[None]:
    busy = UsageError(f"another run is writing to {path}; wait for its end, or name another file")
    if fcntl is None:
        from filelock import FileLock, Timeout  # comes with huggingface-hub

        try:
            with FileLock(f"{path.resolve()}.lock", timeout=0):
                yield
        except Timeout:
            raise busy from None
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError as error:  # a file system that knows no locks
        typer.echo(f"{path} cannot be locked ({error}): start no second run that writes to it", err=True)
    yield
