"""Which releases of transformers were tested. Nothing else is imported: this can be asked when importing fails."""

from __future__ import annotations

import transformers

OLDEST, NEWEST = (5, 15), (5, 24)
"""The releases of transformers (major, minor) between which everything was tested."""


def is_newer() -> bool:
    """True: the installed release is newer than those that were tested."""
    return _release(installed()) > NEWEST


def installed() -> str:
    """Version of transformers."""
    return transformers.__version__


def release_note() -> str:
    """A clause for messages when this release is newer than those that were tested, else empty."""
    if not is_newer():
        return ""
    tested = ".".join(map(str, NEWEST))
    return (
        f" (transformers {installed()} is installed, and hf_hybrid was tested up to {tested}: update "
        f"hf-hybrid, or install transformers<{NEWEST[0]}.{NEWEST[1] + 1})"
    )


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])
