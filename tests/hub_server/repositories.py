"""Repositories: make, delete and describe them, their branches, tags, commits and listings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

import yaml

from tests.hub_server.messages import Answer, HubError, Request, as_json, commit_at, readable, writable
from tests.hub_server.storage import Blob, Commit, Repository

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer

DATE = "2026-01-01T00:00:00.000Z"


def whoami(hub: HubServer, request: Request) -> Answer:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    return as_json({"type": "user", "name": request.user, "orgs": [], "auth": {"type": "access_token"}})


def create(hub: HubServer, request: Request) -> Answer:
    asked = request.json()
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    if asked.get("type", "model") != "model":
        raise HubError(400, "this hub has models alone")
    owner = asked.get("organization") or request.user
    if owner != request.user:
        raise HubError(403, f"{request.user} has no rights in the namespace {owner}")
    name = f"{owner}/{asked['name']}"
    url = {"url": f"{hub.url}/{name}", "name": name, "id": name}
    if name in hub.storage.repositories:
        return as_json({"error": "You already created this model repo"} | url, 409)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    hub.storage.repositories[name] = Repository(name, private)
    return as_json(url)


def delete(hub: HubServer, request: Request) -> Answer:
    asked = request.json()
    name = f"{asked.get('organization') or request.user}/{asked['name']}"
    del hub.storage.repositories[writable(hub, request, name).name]
    return Answer()


def info(hub: HubServer, request: Request, repo: str, revision: str = "main") -> Answer:
    repository = readable(hub, request, repo)
    commit = commit_at(repository, revision)
    card = front_matter(commit)
    siblings = [_sibling(name, blob, "blobs" in request.query) for name, blob in commit.files.items()]
    described = {"library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag")}
    return as_json(
        {
            "_id": repository.name,
            "id": repository.name,
            "modelId": repository.name,
            "author": repository.owner,
            "sha": commit.oid,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "siblings": siblings,
            "cardData": card,
            **{name: value for name, value in described.items() if value is not None},
        }
    )


def front_matter(commit: Commit) -> dict[str, Any]:
    """The metadata of the repository's card."""
    card = commit.files.get("README.md")
    found = re.match(r"---\s*\n(.*?)\n---\s*\n", card.data.decode(), re.S) if card is not None else None
    read = yaml.safe_load(found[1]) if found is not None else None
    return read if isinstance(read, dict) else {}


def _sibling(name: str, blob: Blob, details: bool) -> dict[str, Any]:
    return {"rfilename": name} | ({k: v for k, v in _entry(name, blob).items() if k != "path"} if details else {})


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "oid": blob.oid, "size": len(blob.data)}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


def tree(hub: HubServer, request: Request, repo: str, revision: str, folder: str = "") -> Answer:
    commit = commit_at(readable(hub, request, repo), revision)
    below = f"{folder.rstrip('/')}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    recursive = request.query.get("recursive", "").lower() == "true"
    for name, blob in sorted(commit.files.items()):
        if not name.startswith(below):
            continue
        *folders, _ = name.removeprefix(below).split("/")
        for depth in range(1, len(folders) + 1):
            path = below + "/".join(folders[:depth])
            if recursive or depth == 1:
                entries.setdefault(path, {"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        if recursive or not folders:
            entries[name] = _entry(name, blob)
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    listed = list(entries.values())
    first = int(request.query.get("cursor", 0))
    shown = listed[first : first + hub.storage.page]
    if first + len(shown) >= len(listed):
        return as_json(shown)
    more = urlencode(request.query | {"cursor": first + len(shown)})
    return as_json(shown, headers={"Link": f'<{hub.url}{request.path}?{more}>; rel="next"'})


def paths_info(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    commit = commit_at(readable(hub, request, repo), revision)
    asked = parse_qs(request.body.decode()).get("paths", [])
    return as_json([_entry(name, commit.files[name]) for name in asked if name in commit.files])


def refs(hub: HubServer, request: Request, repo: str) -> Answer:
    repository = readable(hub, request, repo)

    def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]

    branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
    return as_json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


def commits(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    repository = readable(hub, request, repo)
    found, listed = commit_at(repository, revision), []
    while True:
        author = [{"user": repository.owner}]
        listed.append({"id": found.oid, "title": found.title, "message": "", "date": DATE, "authors": author})
        if found.parent is None:
            return as_json(listed)
        found = repository.commits[found.parent]


def branch(hub: HubServer, request: Request, repo: str, name: str) -> Answer:
    repository = writable(hub, request, repo)
    if request.method == "DELETE":
        return _dropped(repository.branches, name)
    if name in repository.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{name}")
    repository.branches[name] = commit_at(repository, request.json().get("startingPoint", "main")).oid
    return Answer(201)


def tag(hub: HubServer, request: Request, repo: str, name: str) -> Answer:
    repository = writable(hub, request, repo)
    if request.method == "DELETE":
        return _dropped(repository.tags, name)
    new = request.json()["tag"]
    if new in repository.tags:
        raise HubError(409, f"Tag already exists: {new}")
    repository.tags[new] = commit_at(repository, name).oid
    return Answer(201)


def _dropped(references: dict[str, str], name: str) -> Answer:
    if references.pop(name, None) is None:
        raise HubError(404, f"no reference {name}", "RevisionNotFound")
    return Answer()


def auth_check(hub: HubServer, request: Request, repo: str) -> Answer:
    readable(hub, request, repo)
    return Answer()


_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"

ROUTES = (
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create),
    ("DELETE", r"/api/repos/delete", delete),
    ("GET", _MODEL, info),
    ("GET", rf"{_MODEL}/revision/(?P<revision>[^/]+)", info),
    ("GET", rf"{_MODEL}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", tree),
    ("POST", rf"{_MODEL}/paths-info/(?P<revision>[^/]+)", paths_info),
    ("GET", rf"{_MODEL}/refs", refs),
    ("GET", rf"{_MODEL}/commits/(?P<revision>[^/]+)", commits),
    (("POST", "DELETE"), rf"{_MODEL}/branch/(?P<name>[^/]+)", branch),
    (("POST", "DELETE"), rf"{_MODEL}/tag/(?P<name>[^/]+)", tag),
    ("GET", rf"{_MODEL}/auth-check", auth_check),
)
