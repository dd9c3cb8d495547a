"""Requests, answers and errors of the hub, and who may do what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.hub_server.storage import Commit, Repository

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer


@dataclass
class Request:
    """A request. ``user``: whose token came with it, None for nobody."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    user: str | None = None

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers.items() if key.lower() == name.lower()), None)

    def json(self) -> dict[str, Any]:
        try:
            data = json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"not JSON: {error}") from error
        if not isinstance(data, dict):
            raise HubError(400, "a JSON object is expected")
        return data


@dataclass
class Answer:
    """An answer; ``headers`` may hide the computed ``Content-Length``."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An answer that is an error. ``code`` is the word by which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def as_json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})


def readable(hub: HubServer, request: Request, name: str) -> Repository:
    """The repository; a private one of somebody else looks as if it were not there."""
    found = hub.storage.repositories.get(name)
    if found is None or (found.private and request.user != found.owner):
        raise HubError(401 if request.user is None else 404, "Repository not found", "RepoNotFound")
    return found


def writable(hub: HubServer, request: Request, name: str) -> Repository:
    """The repository, for its owner alone."""
    found = readable(hub, request, name)
    if request.user != found.owner:
        status = 401 if request.user is None else 403
        raise HubError(status, f"{request.user or 'nobody'} must not write to {name}")
    return found


def commit_at(repository: Repository, revision: str) -> Commit:
    """The commit that a revision names."""
    found = repository.at(revision)
    if found is None:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return found
