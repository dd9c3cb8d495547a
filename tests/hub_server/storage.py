"""What a hub keeps: repositories with commits, branches and tags, and large files by their hash. All in memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

LARGE = 10 * 1024 * 1024
LARGE_ENDINGS = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True)
class Blob:
    """The content of a file. ``lfs``: True when it is kept by its hash, beside the repository."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds instead of a large file."""
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}")
        return "".join(f"{line}\n" for line in lines).encode()

    @cached_property
    def oid(self) -> str:
        """Git's own hash of what it holds."""
        held = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one time."""

    oid: str
    title: str
    files: Mapping[str, Blob]
    parent: str | None


@dataclass
class Repository:
    """A model repository. File names are taken as they come: a test may put hostile ones here directly."""

    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.branches:
            self.commit("main", "initial commit", {})

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, a commit hash or the beginning of one names."""
        if revision.startswith("refs/heads/"):
            revision = revision.removeprefix("refs/heads/")
        oid = self.branches.get(revision) or self.tags.get(revision)
        if oid is None and len(revision) >= 7:
            oid = next((known for known in self.commits if known.startswith(revision)), None)
        return None if oid is None else self.commits[oid]

    def commit(self, branch: str, title: str, add: Mapping[str, Blob], delete: Iterable[str] = ()) -> Commit:
        """Put a commit on ``branch``. ``delete``: files, or folders with a slash at the end."""
        parent = self.branches.get(branch)
        files = dict(self.commits[parent].files) if parent is not None else {}
        for name in delete:
            for gone in [path for path in files if path == name or (name.endswith("/") and path.startswith(name))]:
                del files[gone]
        files.update(add)
        content = [self.name, title, parent, len(self.commits), {name: blob.oid for name, blob in files.items()}]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        made = Commit(oid, title, files, parent)
        self.commits[oid] = made
        self.branches[branch] = oid
        return made


@dataclass
class Storage:
    """Everything on a hub. ``users``: token -> name of the user."""

    users: dict[str, str]
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)  # (sha256, number of the part) -> content
    page: int = 1000  # entries of a listing in one answer
    part_size: int | None = None  # bytes; larger uploads come in parts
    # Name of a repository -> headers that hide those of `resolve`: what a hostile server could say.
    override: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, status of every request
    tokens_at_cdn: list[str] = field(default_factory=list)  # credentials that reached where large files lie
    lock: threading.RLock = field(default_factory=threading.RLock)
