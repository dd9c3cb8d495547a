"""Checks links in a repository's folder: files elsewhere are neither copied into an export nor written over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from transformers.utils.hub import CHAT_TEMPLATE_DIR

from hf_hybrid import checkpoints
from hf_hybrid.portable import FOLDER

_FOLDERS = (FOLDER, CHAT_TEMPLATE_DIR)
"""Folders of a repository that are read or written as a whole."""


class LinkError(ValueError):
    """A link that leads out of a folder; the message says what to put there instead."""


def check_source(folder: Path) -> None:
    """Check that every file that an export reads is in ``folder``, or in its Hub cache, whose snapshots are links.

    The folders of the checkpoints that this package ships are taken as they were installed: some installers link them.

    Raises:
        LinkError: one that does not.
    """
    if folder.parent == Path(checkpoints.__file__).parent:
        return
    for link in _leading_out(folder, _blobs(folder)):
        raise LinkError(
            f"{link} is a link that leads out of {folder}, to {os.readlink(link)}: an export takes nothing from "
            "elsewhere; put a copy of the file there, or remove the link"
        )


def check_target(folder: Path) -> None:
    """Check that files written into ``folder`` stay there.

    Raises:
        LinkError: a link in it leads out.
    """
    for link in _leading_out(folder):
        raise LinkError(
            f"{link} is a link that leads out of {folder}, to {os.readlink(link)}, and would be written over there; "
            "remove the link, or name another folder"
        )


def check_no_link(folder: Path) -> None:
    """Check that ``folder`` is no link itself.

    Raises:
        LinkError: it is one.
    """
    if folder.is_symlink():
        raise LinkError(f"{folder} is a link to {os.readlink(folder)}; name that folder itself, or remove the link")


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` completely or not at all; a link is replaced, never followed.

    ``/dev/stdout`` and the like are written to.
    """
    if any(path.absolute().is_relative_to(system) for system in ("/dev", "/proc")):
        path.write_bytes(content)
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        with fresh.open("xb") as file:  # x: never through a link of that name
            file.write(content)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _leading_out(folder: Path, *homes: Path | None) -> Iterator[Path]:
    """The links of ``folder`` that end neither in it nor in one of the ``homes``."""
    if not folder.is_dir():
        return
    allowed = [home.resolve() for home in (folder, *homes) if home is not None]
    searched = [folder, *(folder / name for name in _FOLDERS if (folder / name).is_dir())]
    for each in searched:
        for entry in sorted(each.iterdir()):
            used = entry.name in _FOLDERS or not entry.is_dir()
            if used and not _is_within(entry, allowed):
                yield entry


def _is_within(link: Path, folders: list[Path]) -> bool:
    try:
        end = link.resolve()
    except (OSError, RuntimeError):  # links in a ring
        return False
    return any(end.is_relative_to(folder) for folder in folders)


def _blobs(folder: Path) -> Path | None:
    """Where a Hub cache keeps the files that the snapshot ``folder`` (or a folder in it) links to; else None."""
    real = folder.resolve()
    for snapshots in real.parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--") and (repository / "blobs").is_dir():
            return repository / "blobs"
    return None
