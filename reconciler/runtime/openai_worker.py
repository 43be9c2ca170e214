"""
The child that runs a test job through a server with the OpenAI API, inside the sandbox: it starts the server, asks it, and stops it.

Both have a loopback interface of their own. When this child ends, so does their namespace, with every process in it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import time
from typing import Any

from reconciler.runtime import inventory, result
from reconciler.runtime.result import TEXT_CHARACTERS, BadModel, CannotTest

_ANSWER_BYTES = 4 << 20
_POLL_SECONDS = 0.05
_STOP_SECONDS = 2.0
_OWN_FAULT = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}
_USAGE_ERRORS = {2, 126, 127}  # exit codes of shells and argument parsers: the command is wrong, not the model


class Server:
    """A server process, and requests to it."""

    def __init__(self, argv: list[str], model: str, ready_seconds: float) -> None:
        self.port = _free_port()
        command = [argument.replace("{model}", model).replace("{port}", str(self.port)) for argument in argv]
        self._deadline = time.monotonic() + ready_seconds
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd="/")  # its output goes to our standard error
        except OSError as error:
            raise CannotTest(f"the server did not start: {error}") from None

    def ask(self, path: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
        """
        Send a request, again until the server accepts it, and return the answer.

        Raises:
            BadModel: the answer is an error or not of this API, or the server died of the request.
            CannotTest: the server did not become ready in time, or its command is wrong.
        """
        while True:
            self._refuse_dead()
            with contextlib.suppress(ConnectionRefusedError):
                status, body = self._request(path, document)
                if status != http.HTTPStatus.SERVICE_UNAVAILABLE:  # it is loading
                    return _decoded(path, status, body)
            if time.monotonic() > self._deadline:
                raise CannotTest("the server was not ready in time")
            time.sleep(_POLL_SECONDS)  # nothing tells when a server listens, or has loaded its model

    def stop(self) -> None:
        """End the server; processes that it leaves behind end with the namespace."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
            return
        self._process.kill()

    def _request(self, path: str, document: dict[str, Any] | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        body = None if document is None else json.dumps(document)
        try:
            connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read(_ANSWER_BYTES)
        except ConnectionRefusedError:
            raise
        except (OSError, http.client.HTTPException) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
            self._refuse_dead()
            raise BadModel(f"the server broke off: {type(error).__name__}: {error}") from None
        finally:
            connection.close()

    def _refuse_dead(self) -> None:
        code = self._process.poll()
        if code is None:
            return
        if code in _USAGE_ERRORS:
            raise CannotTest(f"the server ended with {code}: is its command right?")
        if code < 0 and -code not in _OWN_FAULT:
            raise CannotTest(f"the server was killed by signal {-code}")
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        raise BadModel(f"the server {how} with it")


def main() -> None:
    """Run the job on standard input."""
    result.run_job(_run)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    options, smoke = job["options"], job["smoke"]
    if smoke["expect"]["tokens"] is not None or (smoke["expect"].get("answer") or {}).get("tokens"):
        raise BadModel("token ids are expected, and the OpenAI API gives none")
    if job["model"].endswith(".gguf"):
        inventory.read(job)
    began = time.perf_counter()
    server = Server(options["argv"], job["model"], options["ready_seconds"])
    try:
        name = _name(server.ask("/v1/models"))
        loaded = time.perf_counter() - began
        began = time.perf_counter()
        found = _ASK[smoke["task"]](server, name, smoke)
        seconds = time.perf_counter() - began
    finally:
        server.stop()
    rate = found["tokens"] / seconds if seconds > 0 else 0.0
    return found | {"load_seconds": loaded, "run_seconds": seconds, "tokens_per_second": rate}


def _name(answer: dict[str, Any]) -> str:
    return str(_at(answer, "data", 0, "id"))


def _complete(server: Server, name: str, smoke: dict[str, Any]) -> dict[str, Any]:
    answer = server.ask("/v1/completions", _request(name, smoke) | {"prompt": smoke["prompt"]})
    return _text_and_count(answer, _at(answer, "choices", 0, "text"))


def _chat(server: Server, name: str, smoke: dict[str, Any]) -> dict[str, Any]:
    asked = _request(name, smoke) | {"messages": [{"role": "user", "content": smoke["prompt"]}]}
    answer = server.ask("/v1/chat/completions", asked)
    return _text_and_count(answer, _at(answer, "choices", 0, "message", "content"))


def _embed(server: Server, name: str, smoke: dict[str, Any]) -> dict[str, Any]:
    answer = server.ask("/v1/embeddings", {"model": name, "input": smoke["prompt"]})
    vector = _at(answer, "data", 0, "embedding")
    dimension = result.check_embedding(vector)
    result.check_cosine(vector, smoke)
    return {"dimension": dimension, "tokens": _count(answer, "prompt_tokens")}


_ASK = {"completion": _complete, "chat": _chat, "embedding": _embed}


def _request(name: str, smoke: dict[str, Any]) -> dict[str, Any]:
    return {"model": name, "max_tokens": smoke["max_tokens"], "temperature": 0, "seed": smoke["seed"], "stream": False}


def _text_and_count(answer: dict[str, Any], text: Any) -> dict[str, Any]:
    found = text if isinstance(text, str) else ""
    return {"text": found[:TEXT_CHARACTERS], "tokens": _count(answer, "completion_tokens")}


def _count(answer: dict[str, Any], key: str) -> int:
    usage = answer.get("usage")
    found = usage.get(key) if isinstance(usage, dict) else 0
    return found if isinstance(found, int) and found >= 0 else 0


def _at(document: Any, *keys: str | int) -> Any:
    """Return the value at *keys* in *document*; raise BadModel if there is none."""
    for key in keys:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            raise BadModel(f"the server's answer has no {'.'.join(map(str, keys))}") from None
    return document


def _decoded(path: str, status: int, body: bytes) -> dict[str, Any]:
    if status != http.HTTPStatus.OK:
        raise BadModel(f"the server answered {path} with {status}: {body[:200].decode(errors='replace')}")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadModel(f"the server's answer to {path} is not a JSON document")
    return found


def _free_port() -> int:
    """Return a free port; no other program is in this network namespace to take it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


if __name__ == "__main__":
    main()
