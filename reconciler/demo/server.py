"""A real HTTP server on this machine for the demo's models, which can be told to lie."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from reconciler.core import digest

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Server(ThreadingHTTPServer):
    """Serves *files* by path, with ranges; for the paths in *lies*, as many bytes of something else."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.lies: set[str] = set()

    @property
    def address(self) -> str:
        """The server's URL, without a slash at its end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, data: bytes) -> str:
        """Serve *data* by its digest; return that."""
        name = digest.of(data)
        self.files[self.path_of(name)] = data
        return name

    @staticmethod
    def path_of(name: str) -> str:
        """Return the path under which the blob *name* is served."""
        algorithm, digits = digest.parse(name)
        return f"/{algorithm}/{digits}"

    def body(self, path: str) -> bytes | None:
        """Return what is sent for *path*, true or not."""
        data = self.files.get(path)
        if data is not None and path in self.lies:
            return bytes(byte ^ 0xFF for byte in data)
        return data


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD, whole or one range (RFC 9110, 14)."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send a file."""
        body = self._head()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        """Send what a GET would begin with."""
        self._head()

    def _head(self) -> bytes:
        data = self.server.body(self.path)
        if data is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return b""
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2]) if asked and asked[2] else len(data) - 1, len(data) - 1)
        if asked and first < len(data):
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            first, last = 0, len(data) - 1
            self.send_response(200)
        part = data[first : last + 1]
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return part

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class calls it so
        """Say nothing: the demo's screen is for the engine."""


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Give a server that runs until the end."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
