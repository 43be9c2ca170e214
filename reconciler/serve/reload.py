"""Tells a server that what it reads has changed: by a request, or by a command of the operator."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from reconciler import hooks
from reconciler.core.errors import ServeFailed
from reconciler.serve import client
from reconciler.serve.content import Content, Server

#: llama-server answers when the models that changed are unloaded, each within its ``stop-timeout`` (10 s).
_SECONDS = 120.0


def reload(server: Server, content: Content) -> None:
    """
    Let *server* read *content*, which is written.

    Raises:
        ServeFailed: it refuses, cannot be reached, or does not list what it should.
    """
    if not server.reload:
        return
    if isinstance(server.reload, tuple):
        _run(server.reload, content.given, server.folder)
    elif server.kind == "llama-server":
        _check_listed(server.reload, client.request("GET", server.reload, seconds=_SECONDS), content)
    elif server.kind == "http":
        client.request("POST", server.reload, content.given, seconds=_SECONDS).body_or_raise(server.reload)
    else:
        client.request("POST", server.reload, b"", seconds=_SECONDS).body_or_raise(server.reload)


def _run(argv: tuple[str, ...], given: bytes, folder: Path) -> None:
    with tempfile.TemporaryFile() as index:
        index.write(given)
        index.seek(0)
        if failure := hooks.run(argv, index, folder, _SECONDS):
            raise ServeFailed(f"its reload {failure}")


def _check_listed(url: str, answer: client.Answer, content: Content) -> None:
    """Check that llama-server lists every model that it was told of: it answers a reload although it could not read its file."""
    body = answer.body_or_raise(url)
    try:
        found = {str(model["id"]) for model in msgspec.json.decode(body)["data"]}
    except (msgspec.DecodeError, TypeError, KeyError):
        raise ServeFailed(
            f"{url} answers with no list of models", hint="its reload is the address http://HOST:PORT/models?reload=1"
        ) from None
    if missing := sorted({*content.names} - found):
        raise ServeFailed(
            f"it does not list {', '.join(missing)} after its reload",
            hint="start it with `--models-preset` and the path of its [[serve]] table",
        )
