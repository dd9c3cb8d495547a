"""The HTTP side: a thread per connection, requests handed to the routes, errors in the form that the client reads."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_server import files, repositories
from tests.hub_server.messages import Answer, HubError, Request
from tests.hub_server.storage import Repository, Storage

ROUTES = [(method, re.compile(path), answer) for method, path, answer in (*repositories.ROUTES, *files.ROUTES)]


class HubServer:
    """A hub at ``url`` for as long as the ``with`` block runs.

    Args:
        users: token -> name of the user that it belongs to.
    """

    def __init__(self, users: dict[str, str]) -> None:
        self.storage = Storage(dict(users))
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.hub = self  # type: ignore[attr-defined]
        self.port = int(self._http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        # Large files lie at another host name, as on the real hub, so that a token sent there would be a leak.
        self.cdn = f"http://localhost:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, name="hub", daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def repository(self, name: str, private: bool = False) -> Repository:
        """The repository ``name``, made when it is not there."""
        return self.storage.repositories.setdefault(name, Repository(name, private))

    def unknown_requests(self) -> list[tuple[str, str]]:
        """Requests to endpoints that this server does not have."""
        return [(method, path) for method, path, status in self.storage.asked if status == 501]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        request = Request(self.command, parts.path, query, dict(self.headers.items()), body)
        answer = _answer(self.server.hub, request)
        self.server.hub.storage.asked.append((self.command, parts.path, answer.status))
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _chunks(self) -> bytes:
        read = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            read += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(read)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: ``Storage.asked`` is the log."""


def _answer(hub: HubServer, request: Request) -> Answer:
    try:
        request.user = _user(hub, request)
        for method, path, route in ROUTES:
            found = path.fullmatch(request.path)
            if found is not None and request.method in method:
                values = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                with hub.storage.lock:
                    return route(hub, request, **values)
        raise HubError(501, f"no such endpoint: {request.method} {request.path}")
    except HubError as error:
        headers = {"X-Error-Message": str(error), "Content-Type": "application/json"} | error.headers
        if error.code is not None:
            headers["X-Error-Code"] = error.code
        return Answer(error.status, json.dumps({"error": str(error)}).encode(), headers)


def _user(hub: HubServer, request: Request) -> str | None:
    """Whose token came with a request; None: none came.

    Raises:
        HubError: a token that nobody has.
    """
    given = request.header("Authorization")
    if given is None or request.path.startswith("/cdn/"):
        return None
    user = hub.storage.users.get(given.removeprefix("Bearer "))
    if user is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return user
