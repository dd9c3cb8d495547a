"""Files: what to upload how, large files by their hash, commits, and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from tests.hub_server.messages import Answer, HubError, Request, as_json, commit_at, readable, writable
from tests.hub_server.storage import LARGE, LARGE_ENDINGS, Blob

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer


def validate_yaml(hub: HubServer, request: Request) -> Answer:
    """Check the metadata of a card before it is committed."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", request.json()["content"], re.S)
    try:
        read = yaml.safe_load(found[1]) if found is not None else {}
    except yaml.YAMLError as error:
        return _invalid([f"not YAML: {error}"])
    wrong = _wrong(read) if isinstance(read, dict) else ["metadata is not a mapping"]
    return _invalid(wrong) if wrong else as_json({"errors": [], "warnings": []})


def _invalid(messages: list[str]) -> Answer:
    return as_json({"errors": [{"message": message} for message in messages], "warnings": []}, 400)


def _wrong(card: dict[str, Any]) -> list[str]:
    """What the documented rules for the metadata of model cards forbid."""
    wrong = [
        f'"{key}" must be a string'
        for key in ("license", "library_name", "pipeline_tag")
        if not _text(card, key, False)
    ]
    wrong += [
        f'"{key}" must be a string or a list of them'
        for key in ("language", "tags", "datasets", "base_model", "metrics")
        if not _text(card, key, True)
    ]
    repository = re.compile(r"[\w.-]+(/[\w.-]+)?")
    for key in ("datasets", "base_model"):
        names = card.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            if isinstance(name, str) and repository.fullmatch(name) is None:
                wrong.append(f'"{key}": {name!r} is no id of a repository')
    if card.get("base_model_relation", "finetune") not in ("finetune", "adapter", "quantized", "merge"):
        wrong.append('"base_model_relation" is unknown')
    if "license" in card and re.fullmatch(r"[a-z0-9.+-]+", str(card["license"])) is None:
        wrong.append('"license" must be an identifier')
    if not all(isinstance(item, dict) and "text" in item for item in card.get("widget") or []):
        wrong.append('"widget" must be a list of examples with a text')
    return wrong


def _text(card: dict[str, Any], key: str, several: bool) -> bool:
    value = card.get(key, "")
    return isinstance(value, str) or (several and isinstance(value, list) and all(isinstance(v, str) for v in value))


def preupload(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    """Which files are large, and what of them is there already."""
    commit = commit_at(writable(hub, request, repo), revision)

    def mode(asked: dict[str, Any]) -> dict[str, Any]:
        large = asked["size"] > LARGE or asked["path"].endswith(LARGE_ENDINGS)
        there = commit.files.get(asked["path"])
        oid = None if there is None else there.etag
        return {
            "path": asked["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": oid,
        }

    return as_json({"files": [mode(asked) for asked in request.json()["files"]]})


def lfs_batch(hub: HubServer, request: Request, repo: str) -> Answer:
    """Where to put large files: none for those that are here already."""
    writable(hub, request, repo)

    def location(asked: dict[str, Any]) -> dict[str, Any]:
        oid, size = str(asked["oid"]), int(asked["size"])
        if re.fullmatch(r"[0-9a-f]{64}", oid) is None:
            return {"oid": oid, "size": size, "error": {"code": 422, "message": "not a sha256"}}
        if oid in hub.storage.large:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{hub.cdn}/cdn/{oid}"}
        if hub.storage.part_size is not None and size > hub.storage.part_size:
            count = -(-size // hub.storage.part_size)
            header = {str(n): f"{hub.cdn}/cdn/{oid}/{n}" for n in range(1, count + 1)}
            upload["header"] = header | {"chunk_size": str(hub.storage.part_size)}
        return {
            "oid": oid,
            "size": size,
            "actions": {"upload": upload, "verify": {"href": f"{hub.url}/lfs/verify"}},
        }

    objects = [location(asked) for asked in request.json()["objects"]]
    return as_json({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})


def lfs_put(hub: HubServer, request: Request, oid: str, part: str | None = None) -> Answer:
    """A large file, or a part of one."""
    _watch(hub, request)
    if part is None:
        return _keep(hub, oid, request.body)
    hub.storage.parts[oid, int(part)] = request.body
    return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def lfs_complete(hub: HubServer, request: Request, oid: str) -> Answer:
    """The parts are there: put them together."""
    count = len(request.json()["parts"])
    return _keep(hub, oid, b"".join(hub.storage.parts.pop((oid, n)) for n in range(1, count + 1)))


def _keep(hub: HubServer, oid: str, data: bytes) -> Answer:
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, "the content is not that of this hash")
    hub.storage.large[oid] = data
    return Answer()


def lfs_verify(hub: HubServer, request: Request) -> Answer:
    asked = request.json()
    data = hub.storage.large.get(asked["oid"])
    if request.user is None or data is None or len(data) != asked["size"]:
        raise HubError(404, f"there is no such large file: {asked['oid']}")
    return Answer()


def commit(hub: HubServer, request: Request, repo: str, revision: str) -> Answer:
    """A commit, one JSON value a line: a header, then files, large files and deletions."""
    repository = writable(hub, request, repo)
    if revision not in repository.branches:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    title, add, delete = "", {}, []
    for line in request.body.splitlines():
        key, value = (lambda item: (item["key"], item["value"]))(json.loads(line))
        if key == "header":
            title = value["summary"]
            if value.get("parentCommit", repository.branches[revision]) != repository.branches[revision]:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            continue
        path = value["path"]
        if path.startswith("/") or "\\" in path or {"", ".", ".."} & set(path.rstrip("/").split("/")):
            raise HubError(400, f"invalid path: {path}")
        if key == "file":
            add[path] = Blob(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile":
            if value["oid"] not in hub.storage.large:
                raise HubError(400, f"{path}: the large file was not uploaded")
            add[path] = Blob(hub.storage.large[value["oid"]], lfs=True)
        else:
            delete.append(f"{path.rstrip('/')}/" if key == "deletedFolder" else path)
    made = repository.commit(revision, title, add, delete)
    url = f"{hub.url}/{repo}/commit/{made.oid}"
    return as_json({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})


def resolve(hub: HubServer, request: Request, repo: str, revision: str, name: str) -> Answer:
    """A file, or where it lies: large ones are at another host."""
    found = commit_at(readable(hub, request, repo), revision)
    blob = found.files.get(name)
    if blob is None:
        raise HubError(404, f"Entry not found: {name}", "EntryNotFound", **{"X-Repo-Commit": found.oid})
    override = hub.storage.override.get(repo, {})
    headers = {"X-Repo-Commit": found.oid, "Accept-Ranges": "bytes", "ETag": f'"{blob.etag}"'}
    if blob.lfs:
        hub.storage.large[blob.sha256] = blob.data
        headers |= {
            "X-Linked-Size": str(len(blob.data)),
            "X-Linked-ETag": f'"{blob.sha256}"',
            "Location": f"{hub.cdn}/cdn/{blob.sha256}?name={quote(name, safe='')}",
        }
        return Answer(302, b"", headers | override)
    kind = mimetypes.guess_type(name)[0] or "text/plain"
    return _range(request, blob.data, headers | {"Content-Type": kind} | override)


def cdn(hub: HubServer, request: Request, oid: str) -> Answer:
    _watch(hub, request)
    data = hub.storage.large.get(oid)
    if data is None:
        raise HubError(404, "there is no such large file")
    return _range(request, data, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _range(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """The part of a file that a download which goes on asks for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.header("Range") or "")
    if found is None:
        return Answer(200, data, headers)
    first, last = int(found[1]), int(found[2]) if found[2] else len(data) - 1
    if first >= len(data):
        raise HubError(416, "the range begins behind the end")
    part = data[first : last + 1]
    return Answer(206, part, headers | {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"})


def _watch(hub: HubServer, request: Request) -> None:
    if (token := request.header("Authorization")) is not None:
        hub.storage.tokens_at_cdn.append(token)


_REPO = r"(?P<repo>[^/]+/[^/]+)"

ROUTES = (
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/cdn/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", lfs_put),
    ("POST", r"/cdn/(?P<oid>[0-9a-f]{64})", lfs_complete),
    ("POST", r"/lfs/verify", lfs_verify),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", commit),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", resolve),
    (("GET", "HEAD"), r"/cdn/(?P<oid>[0-9a-f]{64})", cdn),
)
