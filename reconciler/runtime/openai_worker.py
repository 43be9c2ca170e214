"""
The child that runs a test job through a server with the OpenAI API, inside the sandbox: it starts the server, asks it, and stops it.

Rules that hold here:

1. With namespaces both have a loopback interface of their own, and when this child ends, so does their namespace with every process in it.
   Without them the server listens on a port of the machine's, and only a socket of our own user is spoken to there.
2. A server has started when it answers ``/v1/models``. Until then, nothing that it does or says is an answer of the model's: the child
   says only how it ended, and its parent decides whose fault that is.
3. The time that the snapshot allows the test job begins when the server has started.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from reconciler import loopback
from reconciler.runtime import hub_folder, inventory, known_answer, result
from reconciler.runtime.result import TEXT_CHARACTERS, BadModel, CannotTest
from reconciler.runtime.server_process import ServerProcess, filled
from reconciler.sandbox import confine

_ANSWER_BYTES = 4 << 20
_POLL_SECONDS = 0.05
_DYING_SECONDS = 2.0
_LISTENS = "0A"  # of a line in /proc/net/tcp
#: Tokens of context that a test job gets: what its prompt and its answer can take, and a chat template around them.
_LEAST_CONTEXT, _MOST_CONTEXT, _TEMPLATE_TOKENS = 512, 8192, 512


class DidNotStart(Exception):
    """The server never answered; *failure* is the word for it (``blame.ServerFailure``)."""

    def __init__(self, why: str, failure: str = "not-started") -> None:
        super().__init__(why)
        self.failure = failure


class Server:
    """A server process, and requests to it."""

    def __init__(self, job: dict[str, Any], context: int, began: float) -> None:
        options, model = job["options"], job["model"]
        self._bare = "port" in job
        self._port = job.get("port") or loopback.free_port()
        values = {"model": model, "folder": job["tree"], "name": job["name"], "port": str(self._port), "context": str(context)}
        self._names = (job["name"], job["tree"], model)
        self._command = filled(options["argv"], values)
        self._ready_by = time.monotonic() + options["ready_seconds"]
        self._answer_seconds, self._end_by = options["answer_seconds"], began + options["most_seconds"]
        try:
            self.process = ServerProcess(self._command, job)
        except CannotTest as error:
            raise DidNotStart(str(error)) from None

    def start(self) -> str:
        """
        Wait until the server answers, and return the name under which it has the model.

        Raises:
            DidNotStart: it ended, or did not answer in time.
            BadModel: it answered something that is not of this API.
        """
        while True:
            self._refuse_dead()
            with contextlib.suppress(ConnectionError, TimeoutError, http.client.HTTPException):
                status, body = self._request("/v1/models", None, max(0.1, self._ready_by - time.monotonic()))
                if status != http.HTTPStatus.SERVICE_UNAVAILABLE:  # it is loading
                    self._refuse_stranger()
                    return self._name(_decoded("/v1/models", status, body))
            if time.monotonic() > self._ready_by:
                raise DidNotStart("it was not ready in time")
            time.sleep(_POLL_SECONDS)  # nothing tells when a server listens, or has loaded its model

    def ask(self, path: str, document: dict[str, Any]) -> dict[str, Any]:
        """
        Send a request and return the answer.

        Raises:
            BadModel: the answer is not of this API, is late, or the server died of the request.
            CannotTest: the server was killed from outside, or started so late that no time is left.
            ServerError: the answer is an error.
        """
        left = self._end_by - time.perf_counter()
        try:
            status, body = self._request(path, document, max(1.0, min(self._answer_seconds, left)))
        except TimeoutError:
            if left < self._answer_seconds:
                raise CannotTest("the server took so long to start that [smoke] timeout leaves too little for the test job") from None
            raise BadModel(f"its test job did not end in time: no answer to {path} in {self._answer_seconds:.0f} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            self._refuse_dead_of_request()
            raise BadModel(f"the server broke off: {type(error).__name__}: {error}") from None
        if status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            raise ServerError(_said(path, status, body))
        return _decoded(path, status, body)

    def _request(self, path: str, document: dict[str, Any] | None, seconds: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=seconds)
        body = None if document is None else json.dumps(document)
        try:
            connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read(_ANSWER_BYTES)
        finally:
            connection.close()

    def _refuse_dead(self) -> None:
        code = self.process.poll()
        if self.process.excess:
            raise DidNotStart(self.process.excess, "hindered")
        if code is not None:
            raise DidNotStart(_how_it_ended(code), "not-started" if code >= 0 or -code in _OWN_FAULT else "hindered")

    def _refuse_dead_of_request(self) -> None:
        code = self.process.wait(_DYING_SECONDS)
        if self.process.excess:
            raise CannotTest(f"the server was killed: {self.process.excess}")
        if code is None:
            return
        if code < 0 and -code not in _OWN_FAULT:
            raise CannotTest(f"the server was killed by signal {-code}")
        raise BadModel(f"the server {_how_it_ended(code).removeprefix('it ')} when it was asked")

    def _refuse_stranger(self) -> None:
        """Refuse an answer from another user's socket: without namespaces, any program of this machine may take the port first."""
        if self._bare and not any(_listens(fd, self._port) for fd in confine.SOCKET_TABLES):
            raise DidNotStart(f"another user's program has port {self._port}", "hindered")

    def _name(self, answer: dict[str, Any]) -> str:
        """Return the name to ask for: one that the command gives, else the server's first; some name a model only once it was asked for."""
        models = _at(answer, "data")
        named = [str(_at(model, "id")) for model in models] if isinstance(models, list) else []
        wanted = [name for name in self._names if name in named]
        given = [name for name in self._names if name in self._command]
        return (wanted or named or given or [self._names[1]])[0]


class ServerError(BadModel):
    """The server answered a request with an error of its own."""


_OWN_FAULT = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"it ended with {code}"
    return f"it died of {signal.Signals(-code).name}" if -code in _OWN_FAULT else f"it was killed by signal {-code}"


def _listens(table: int, port: int) -> bool:
    """Whether a socket of our own user listens on *port*, by the kernel's table of sockets."""
    text = b""
    while chunk := os.pread(table, 65_536, len(text)):
        text += chunk
    for line in text.decode().splitlines()[1:]:
        words = line.split()
        if words[3] == _LISTENS and int(words[1].rpartition(":")[2], 16) == port and int(words[7]) == os.getuid():
            return True
    return False


def main() -> None:
    """Run the job on standard input."""
    result.run_job(_run)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    smoke = job["smoke"]
    if smoke["expect"]["tokens"] is not None or (smoke["expect"].get("answer") or {}).get("tokens"):
        raise BadModel("token ids are expected, and the OpenAI API gives none")
    most = _check_files(job)
    began = time.perf_counter()
    result.report_phase("starting the server")
    try:
        server = Server(job, _context(smoke, most), began)
    except DidNotStart as error:
        return _unstarted(error)
    try:
        name = server.start()
        result.note(load_seconds=time.perf_counter() - began)
        result.report_phase("running the test job")
        return _asked(server, name, smoke, record=job["record"])
    except DidNotStart as error:
        return _unstarted(error)
    finally:
        server.process.note_devices()
        server.process.stop()
        result.note(on_gpu=server.process.on_gpu, exercised=sorted(server.process.opened)[:_MOST_FILES])


def _unstarted(error: DidNotStart) -> dict[str, Any]:
    return {"verdict": "unable", "server": error.failure, "reason": str(error)}


_MOST_FILES = 4096


def _asked(server: Server, name: str, smoke: dict[str, Any], *, record: bool) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        found = _embed(server, name, smoke, record=record) if smoke["task"] == "embedding" else _ASK[smoke["task"]](server, name, smoke)
    except ServerError as error:
        return {"verdict": "unable", "server": "refused", "reason": str(error), "run_seconds": time.perf_counter() - began}
    seconds = time.perf_counter() - began
    return found | {"run_seconds": seconds, "tokens_per_second": found["tokens"] / seconds if seconds > 0 else 0.0}


def _check_files(job: dict[str, Any]) -> int:
    """Check the files before the server sees them, and return how many tokens of context the model takes; 0 where it does not say."""
    result.report_phase("reading the files")
    if job["model"].endswith(".gguf"):
        facts = inventory.read(job)[job["entrypoint"]].facts
        return facts.context_length if facts else 0
    if not Path(job["model"]).is_file():
        raise BadModel(f"the model has no file {job['entrypoint']!r}")
    inventory.check_names(job)
    return hub_folder.context_length(hub_folder.check(Path(job["tree"])))


def _context(smoke: dict[str, Any], most: int) -> int:
    """Return a context size that holds the job for certain: no tokenizer makes more tokens than bytes, beside a few special ones."""
    needed: int = len(smoke["prompt"].encode()) + smoke["max_tokens"] + 64 + (_TEMPLATE_TOKENS if smoke["task"] == "chat" else 0)
    wanted = min(max(_LEAST_CONTEXT, -(-needed // 256) * 256), _MOST_CONTEXT)
    return min(wanted, most) if most else wanted


def _complete(server: Server, name: str, smoke: dict[str, Any]) -> dict[str, Any]:
    answer = server.ask("/v1/completions", _request(name, smoke) | {"prompt": smoke["prompt"]})
    return _text_and_count(answer, _at(answer, "choices", 0, "text"))


def _chat(server: Server, name: str, smoke: dict[str, Any]) -> dict[str, Any]:
    asked = _request(name, smoke) | {"messages": [{"role": "user", "content": smoke["prompt"]}]}
    answer = server.ask("/v1/chat/completions", asked)
    return _text_and_count(answer, _at(answer, "choices", 0, "message", "content"))


def _embed(server: Server, name: str, smoke: dict[str, Any], *, record: bool) -> dict[str, Any]:
    answer = server.ask("/v1/embeddings", {"model": name, "input": smoke["prompt"]})
    vector = _at(answer, "data", 0, "embedding")
    dimension = result.check_embedding(vector)
    found = {"dimension": dimension, "tokens": _count(answer, "prompt_tokens")}
    if record:
        return found | {"answer": known_answer.embedding(vector)}
    return found | {"compared": known_answer.compare_embedding(vector, smoke)}


_ASK = {"completion": _complete, "chat": _chat}


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


def _said(path: str, status: int, body: bytes) -> str:
    return f"the server answered {path} with {status}: {body[:500].decode(errors='replace')}"


def _decoded(path: str, status: int, body: bytes) -> dict[str, Any]:
    if status != http.HTTPStatus.OK:
        raise BadModel(_said(path, status, body))
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadModel(f"the server's answer to {path} is not a JSON document")
    return found


if __name__ == "__main__":
    main()
