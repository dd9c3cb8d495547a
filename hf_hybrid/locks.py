"""Locks on files and folders, so that one job at a time writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


class InUseError(ValueError):
    """Another process, or another thread, is writing there; the message names the file or folder."""


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold ``path`` alone for the length of a ``with`` block.

    The lock is the operating system's (``fcntl.flock`` or ``msvcrt.locking``; where a file system has neither, a file
    that names its process), so it ends with the process, also with one that is killed. It excludes only those who ask
    for it too.

    Args:
        path: a folder that is there, or a file that may be missing, in a folder that is there. Two names of one file
            (links) are one.
        what: the job, for the message: ``"training run"``.

    Raises:
        InUseError: somebody else holds it. Nothing was waited for.
        OSError: the lock cannot be written there.
    """
    real = path.resolve()
    mark = real / ".lock" if real.is_dir() else real.with_name(f".{real.name}.lock")
    # thread_local=False: the lock is the block's, whatever thread closes it.
    lock = FileLock(mark, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUseError(
            f"{path} is in use by another {what}: wait until that one has ended, or write somewhere else"
        ) from error
    try:
        yield
    finally:
        # Remove it before the release: whoever opened the file earlier sees that it is gone, and asks again.
        with suppress(OSError):
            mark.unlink()
        lock.release()
