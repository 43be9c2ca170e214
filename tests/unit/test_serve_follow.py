"""Following, server by server: what is asked, what is written and what is remembered; the servers answer as the test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from reconciler.core.errors import ServeFailed
from reconciler.core.events import Event, Incident, Notice
from reconciler.core.state import Generation, ServerState
from reconciler.serve import client, drain
from reconciler.serve.content import Server
from reconciler.serve.drain import Activity
from reconciler.serve.follow import ServerFollower
from reconciler.store import atomic, serving
from reconciler.store.generations import Generations
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger
from tests.contract.test_generations_contract import entry


class Router(ThreadingHTTPServer):
    """Answers as llama-server's router does: its models are *states* by name, and a reload lists what the file names."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.presets = Path()
        self.states: dict[str, str] = {}
        self.busy: set[str] = set()
        self.log: list[str] = []
        self.pages: dict[str, tuple[int, bytes]] = {}
        #: What happens when a path is asked for.
        self.when: Callable[[str], None] = lambda _: None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Router

    def do_GET(self) -> None:
        self.server.log.append(self.path)
        self.server.when(self.path)
        status, body = self.server.pages.get(self.path) or (200, json.dumps(self._answer()).encode())
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self) -> Any:
        if self.path.startswith("/slots"):
            name = self.path.partition("model=")[2].partition("&")[0]
            return [{"is_processing": False}, {"is_processing": name in self.server.busy}]
        if self.path == "/models?reload=1":
            names = [line[1:-1] for line in self.server.presets.read_text().splitlines() if line.startswith("[")]
            return {"data": [{"id": name} for name in names]}
        return {"data": [{"id": name, "status": {"value": state}} for name, state in self.server.states.items()]}

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        del format, args


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    with Router() as made:
        made.presets = tmp_path / "models.ini"
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


class Following:
    """A store with generations, and one llama-server that follows."""

    def __init__(self, folder: Path, router: Router, ledger: Ledger) -> None:
        self.layout = Layout(folder / "store", folder / "cold")
        self.router = router
        self.ledger = ledger
        self.events: list[Event] = []
        self.server = Server(
            name="main", kind="llama-server", path=router.presets, reload=f"{router.address}/models?reload=1", drain_seconds=0.2
        )

    def swap(self, *models: str) -> Generation:
        return Generations(self.layout).swap({model: structs.replace(entry(model, model.encode()), current=True) for model in models})

    def follow(self, generation: Generation) -> ServerState:
        follower = ServerFollower(self.layout, (self.server,), self.ledger, report=self.events.append, now=lambda: datetime.now(UTC))
        (state,) = follower.follow(generation)
        return state

    def asked(self) -> list[str]:
        """Return what was asked since the last time, each once."""
        log, self.router.log = self.router.log, []
        return list(dict.fromkeys(log))


@pytest.fixture
def following(tmp_path: Path, router: Router) -> Iterator[Following]:
    layout = Layout(tmp_path / "store", tmp_path / "cold")
    atomic.make_folder(layout.generations)
    with Ledger.writing(layout.ledger) as ledger:
        made = Following(tmp_path, router, ledger)
        assert made.follow(made.swap("a:v1", "b:v1")).error == ""
        made.asked()
        yield made


RELOAD = "/models?reload=1"


def test_a_server_that_has_the_set_is_asked_nothing(following: Following) -> None:
    following.follow(following.swap("a:v1", "b:v1"))

    assert following.asked() == []


def test_a_reload_waits_for_what_it_would_unload_and_for_nothing_else(following: Following, router: Router) -> None:
    router.states, router.busy = {"a": "loaded", "b": "loaded"}, {"b"}
    following.server = structs.replace(following.server, drain_seconds=60.0)

    assert following.follow(following.swap("a:v2", "b:v1")).error == ""
    assert following.asked() == ["/models", "/slots?model=a&autoload=false", RELOAD]


def test_a_busy_model_is_waited_for_until_it_ends(following: Following, router: Router) -> None:
    router.states, router.busy = {"a": "loaded"}, {"a"}
    following.server = structs.replace(following.server, drain_seconds=60.0)
    looks = []

    def end_after_five(path: str) -> None:
        looks.append(path)
        if len(looks) == 10:
            router.busy.clear()

    router.when = end_after_five
    assert following.follow(following.swap("a:v2")).error == ""
    assert router.log[-1] == RELOAD
    assert not any(isinstance(event, Notice) and event.level == "warning" for event in following.events)


def test_a_model_that_is_loaded_is_waited_for_because_somebody_asked_for_it(following: Following, router: Router) -> None:
    router.states = {"a": "loading"}
    following.server = structs.replace(following.server, drain_seconds=60.0)
    seen: list[str] = []

    def load(path: str) -> None:
        seen.append(router.states["a"])
        if len(seen) == 3:
            router.states["a"] = "loaded"

    router.when = load
    assert following.follow(following.swap("a:v2")).error == ""
    assert router.log.index("/slots?model=a&autoload=false") >= 3
    assert router.log[-1] == RELOAD


def test_a_wait_ends_with_the_drain_and_the_reload_goes_on(following: Following, router: Router) -> None:
    router.states, router.busy = {"a": "loaded"}, {"a"}

    assert following.follow(following.swap("a:v2")).error == ""
    assert following.asked()[-1] == RELOAD
    assert any(isinstance(event, Notice) and "busy for all of its drain" in event.text for event in following.events)


@pytest.mark.parametrize(
    ("page", "answer"),
    [
        ("/models", (200, b"<html>")),
        ("/models", (200, b'{"data": [{"id": "a"}]}')),
        ("/models", (200, b"[]")),
        ("/slots?model=a&autoload=false", (501, b'{"error": "this server does not support slots"}')),
        ("/slots?model=a&autoload=false", (200, b"{}")),
        ("/slots?model=a&autoload=false", (200, b'[{"id": 0}]')),
        ("/slots?model=a&autoload=false", (401, b"no key")),
    ],
)
def test_where_idleness_cannot_be_learned_nothing_is_reloaded(
    following: Following, router: Router, page: str, answer: tuple[int, bytes]
) -> None:
    router.states, router.pages = {"a": "loaded"}, {page: answer}
    before = following.swap("a:v2")
    state = following.follow(before)

    assert RELOAD not in following.asked()
    assert (state.generation, state.error != "") == (1, True)
    router.pages = {}
    assert following.follow(before).error == ""
    assert following.asked()[-1] == RELOAD


def test_after_a_reload_that_failed_everything_that_runs_is_waited_for(following: Following, router: Router) -> None:
    router.pages = {RELOAD: (500, b"failed to parse")}
    made = following.swap("a:v2", "b:v1")
    assert "failed to parse" in following.follow(made).error
    following.asked()
    router.pages, router.states = {}, {"a": "loaded", "b": "loaded"}

    assert following.follow(made).error == ""
    assert "/slots?model=b&autoload=false" in following.asked(), "it is not known which sections it read last"


def test_a_server_that_does_not_list_what_it_was_told_of_has_not_taken_it(following: Following, router: Router) -> None:
    router.pages = {RELOAD: (200, b'{"data": [{"id": "a"}]}')}
    state = following.follow(following.swap("a:v1", "c:v1"))

    assert "does not list c" in state.error
    assert state.generation == 1


def test_without_a_drain_nothing_is_asked(following: Following, router: Router) -> None:
    router.states, router.busy = {"a": "loaded"}, {"a"}
    following.server = structs.replace(following.server, drain_seconds=0.0)
    assert following.follow(following.swap("a:v2")).error == ""

    assert following.asked() == [RELOAD]


def test_a_failure_is_one_incident_until_it_ends(following: Following, router: Router) -> None:
    router.pages = {RELOAD: (503, b"")}
    made = following.swap("a:v2")
    for _ in range(3):
        assert following.follow(made).generation == 1
    assert serving.read(following.layout).generation == made.number
    router.pages = {}
    assert following.follow(made).generation == made.number

    assert [event.kind for event in following.events if isinstance(event, Incident)] == ["serve-failed"]
    assert any(isinstance(event, Notice) and "follows again, after 3 tries" in event.text for event in following.events)


def test_a_server_at_another_address_is_told_though_its_file_is_the_same(following: Following, router: Router) -> None:
    following.server = structs.replace(following.server, reload=f"http://localhost:{router.server_port}/models?reload=1")
    following.follow(following.swap("a:v1", "b:v1"))

    assert following.asked() == ["/models", RELOAD]


# -- what is asked


@pytest.mark.parametrize(
    ("text", "busy"),
    [
        ('vllm:num_requests_running{model_name="a"} 0.0\nvllm:num_requests_waiting{model_name="a"} 0.0\n', False),
        ('vllm:num_requests_running{engine="0",model_name="a"} 1.0\nvllm:num_requests_waiting{model_name="a"} 0.0\n', True),
        ("vllm:num_requests_running 0\nvllm:num_requests_waiting 3\n", True),
    ],
)
def test_vllm_tells_by_its_metrics(router: Router, text: str, busy: bool) -> None:
    router.pages = {"/metrics": (200, text.encode())}
    assert drain.activity_of_vllm(f"{router.address}/metrics") == ("busy" if busy else "idle")


@pytest.mark.parametrize("text", ["", "# TYPE vllm:num_requests_running gauge\n", "other_running 0\n"])
def test_metrics_that_do_not_tell_are_no_idleness(router: Router, text: str) -> None:
    router.pages = {"/metrics": (200, text.encode())}
    with pytest.raises(ServeFailed, match="num_requests_running"):
        drain.activity_of_vllm(f"{router.address}/metrics")


def test_who_nobody_listens_for_serves_nobody() -> None:
    assert drain.activity_of_vllm("http://127.0.0.1:1/metrics") == "nobody"
    assert drain.activity_of_llama_server("http://127.0.0.1:1", lambda _: True) == "nobody"


def test_an_answer_that_is_too_long_is_none(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MOST_BYTES", 100)
    router.pages = {"/models": (200, b"x" * 101)}
    with pytest.raises(ServeFailed, match="more than"):
        client.request("GET", f"{router.address}/models", seconds=5)


def test_a_server_that_answers_slowly_is_not_waited_for_without_end() -> None:
    looks: list[float] = []

    def slow() -> Activity:
        time.sleep(0.05)
        looks.append(time.monotonic())
        return "busy" if len(looks) == 1 else "idle"

    assert drain.wait(Server(name="main", kind="llama-server", drain_seconds=60.0), slow)
    assert len(looks) < 20


@pytest.mark.parametrize(
    ("answers", "looks"),
    [
        (["busy", "idle"], 2),  # a request has just ended
        (["busy", "busy", "idle"], 3),
        (["idle", "busy", "idle"], 3),  # what looked idle at first was a pause of unknown length
        (["nobody"], 1),
    ],
)
def test_the_moment_that_is_waited_for_is_the_end_of_a_request(answers: list[Activity], looks: int) -> None:
    left = list(answers)
    server = Server(name="main", kind="llama-server", drain_seconds=60.0)

    assert drain.wait(server, lambda: left.pop(0), sleep=lambda _: None)
    assert looks == len(answers) - len(left)
