"""
A hub of models on this machine, as the real one answers its client: repositories at commits, large files by redirect to another host with
a signature in the URL, gated repositories, and errors with the client's headers.

``127.0.0.1`` is the hub, ``localhost`` at another port is its CDN. What was asked is kept, with the headers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
SIGNATURE = "X-Amz-Signature=0badc0ffee"


@dataclass
class Repository:
    """A repository at one commit; files of more than ``large`` bytes are in large-file storage."""

    files: dict[str, bytes]
    commit: str = "c" * 40
    gated: bool = False
    licence: str = "apache-2.0"
    large: int = 1024


@dataclass
class Asked:
    """One request."""

    server: str
    path: str
    query: str
    headers: dict[str, str] = field(default_factory=dict)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.name = hub, name


class Hub:
    """The hub and its CDN; a context manager."""

    def __init__(self, token: str = "") -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.asked: list[Asked] = []
        self._hub, self._cdn = _Server(self, "hub"), _Server(self, "cdn")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_address[1]}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self._cdn.server_address[1]}"

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in (self._hub, self._cdn)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    def requests(self, server: str) -> list[Asked]:
        return [one for one in self.asked if one.server == server]

    # -- answers -------------------------------------------------------------------------------------

    def answer(self, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a request."""
        if asked.server == "cdn":
            return self._cdn_answer(asked)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", asked.path):
            return self._info(found[1], unquote(found[2] or "main"))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", asked.path):
            return self._file(found[1], found[2], unquote(found[3]), asked)
        return _error(404, "EntryNotFound")

    def _info(self, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        repository = self.repositories.get(name)
        if repository is None:
            return _error(401, "RepoNotFound")
        if revision not in {"main", repository.commit}:
            return _error(404, "RevisionNotFound")
        siblings = [_sibling(path, data, repository) for path, data in repository.files.items()]
        document = {
            "_id": "1", "id": name, "modelId": name, "sha": repository.commit, "private": False, "disabled": False,
            "gated": "auto" if repository.gated else False, "downloads": 1, "likes": 0, "siblings": siblings,
            "tags": ["gguf", f"license:{repository.licence}"], "cardData": {"license": repository.licence},
            "createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip
        return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()

    def _file(self, name: str, revision: str, path: str, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        repository = self.repositories.get(name)
        if repository is None or revision != repository.commit or path not in repository.files:
            return _error(404, "EntryNotFound")
        if repository.gated and asked.headers.get("authorization") != f"Bearer {self.token}":
            return _error(401 if "authorization" not in asked.headers else 403, "GatedRepo")
        data = repository.files[path]
        digits = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{digits}"', "X-Repo-Commit": repository.commit}
        if len(data) > repository.large:
            location = f"{self.cdn}/lfs/{name}/{digits}?{SIGNATURE}&X-Amz-Expires=3600"
            return 302, headers | {"Location": location, "X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digits}"'}, b""
        return 200, headers, data

    def _cdn_answer(self, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        if SIGNATURE not in asked.query:
            return 403, {}, b""
        digits = asked.path.rpartition("/")[2]
        for repository in self.repositories.values():
            for data in repository.files.values():
                if hashlib.sha256(data).hexdigest() == digits:
                    return 200, {}, data
        return 404, {}, b""


def _sibling(path: str, data: bytes, repository: Repository) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    found: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
    if len(data) > repository.large:
        found["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return found


def _error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": code, "Content-Type": "application/json"}, b'{"error": "no"}'


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        asked = Asked(self.server.name, parts.path, parts.query, {name.lower(): value for name, value in self.headers.items()})
        self.server.hub.asked.append(asked)
        status, headers, body = self.server.hub.answer(asked)
        wanted = _RANGE.fullmatch(self.headers.get("Range", "")) if status == 200 else None
        if wanted and body:
            first, last = int(wanted[1]), min(int(wanted[2] or len(body) - 1), len(body) - 1)
            headers, status = headers | {"Content-Range": f"bytes {first}-{last}/{len(body)}"}, 206
            body = body[first : last + 1]
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815  as http.server names it

    def log_message(self, *_: object) -> None:
        """Say nothing."""
