"""The engine openai for real: another program's server, started, asked and stopped inside the sandbox."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from reconciler import settings_file
from reconciler.core.errors import SettingsError
from reconciler.ports import TestReport
from reconciler.runtime import engines
from reconciler.runtime.engines import OpenAI
from reconciler.sandbox import choose, confine
from tests import jobs
from tests.demand import working
from tests.node import Node, tiny

LLAMA = ("-m", "llama_cpp.server", "--model", "{model}", "--host", "127.0.0.1", "--port", "{port}", "--n_ctx", "256")

#: Servers of one page each, for what no honest one does.
LIARS = {
    "answers-with-text": "self.reply(200, b'hello')",
    "answers-with-a-list": "self.reply(200, b'[]')",
    "answers-without-choices": 'self.reply(200, b\'{"data": [{"id": "m"}]}\')',
    "answers-with-an-error": 'self.reply(500, b\'{"error": "broken"}\')',
    "answers-too-deep": "self.reply(200, b'[' * 100000)",
    "answers-without-end": "self.endless()",
    "dies-when-asked": 'os._exit(3) if self.command == \'POST\' else self.reply(200, b\'{"data": [{"id": "m"}]}\')',
    "crashes-when-asked": 'os.abort() if self.command == \'POST\' else self.reply(200, b\'{"data": [{"id": "m"}]}\')',
}
_LIAR = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def endless(self):
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b"x" * 65536)
    def do_GET(self):
        {action}
    do_POST = do_GET
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    working("bubblewrap")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def configured(*argv: str, extra: str = "") -> str:
    return f"[runtime.openai]\nargv = {json.dumps(list(argv))}\n{extra}"


def llama_server() -> str:
    if importlib.util.find_spec("uvicorn") is None:
        pytest.skip("llama-cpp-python's server is not installed: pip install 'llama-cpp-python[server]'")
    return configured(sys.executable, *LLAMA)


def ran(folder: Path, data: bytes, text: str, **changes: Any) -> TestReport:
    return jobs.make_tester(folder, text).test(jobs.job(folder, data, engine="openai", **changes))


# -- another program's server ------------------------------------------------------------------------


def test_a_real_server_completes_in_the_sandbox(tmp_path: Path) -> None:
    report = ran(tmp_path, tiny("a"), llama_server() + 'version = "0.3.36"\n', expect={"min_tokens": 1, "regex": "(?s)."})
    assert (report.verdict, report.reason) == ("passed", "")
    assert (report.engine, report.engine_version, report.sandbox) == ("openai", "0.3.36", "bubblewrap")
    assert report.tokens == 4
    assert report.load_seconds > 0


def test_a_real_server_chats(tmp_path: Path) -> None:
    report = ran(tmp_path, tiny("c", "chat"), llama_server(), task="chat")
    assert (report.verdict, report.reason) == ("passed", "")
    assert report.text


def test_a_real_server_embeds(tmp_path: Path) -> None:
    text = configured(sys.executable, *LLAMA, "--embedding", "true") if llama_server() else ""
    assert ran(tmp_path, tiny("e", "embedding"), text, task="embedding", expect={"dimension": 32}).verdict == "passed"
    wrong = ran(tmp_path, tiny("e", "embedding"), text, task="embedding", expect={"dimension": 33})
    assert (wrong.verdict, wrong.reason) == ("bad", "its embedding has 32 components, expected 33")


def test_a_real_servers_embedding_is_recorded_and_compared(tmp_path: Path) -> None:
    text = configured(sys.executable, *LLAMA, "--embedding", "true") if llama_server() else ""
    job = jobs.job(tmp_path, tiny("e", "embedding"), engine="openai", task="embedding")
    made = jobs.make_tester(tmp_path, text).test(msgspec.structs.replace(job, record=True))
    assert (made.verdict, made.compared) == ("passed", 0)
    answer = msgspec.to_builtins(made.answer)
    assert len(answer["embedding"]) == 32
    right, wrong = (ran(tmp_path, tiny(name, "embedding"), text, task="embedding", expect={"answer": answer}) for name in "ef")
    assert (right.verdict, right.compared) == ("passed", 1)
    assert (wrong.verdict, wrong.compared) == ("bad", 0)
    assert wrong.reason.startswith("it computes another answer than the network signed: the cosine to its embedding is ")


def test_what_is_expected_of_a_servers_answer_must_hold(tmp_path: Path) -> None:
    report = ran(tmp_path, tiny("a"), llama_server(), expect={"text": "Paris"})
    assert report.verdict == "bad"
    assert report.reason.startswith("its answer does not contain 'Paris'")


def test_token_ids_cannot_be_expected_of_an_api_that_tells_none(tmp_path: Path) -> None:
    report = ran(tmp_path, tiny("a"), configured("/bin/true"), expect={"tokens": [1]})
    assert (report.verdict, report.reason) == ("bad", "token ids are expected, and the OpenAI API gives none")


def test_a_malformed_file_fails_before_the_server_sees_it(tmp_path: Path) -> None:
    report = ran(tmp_path, tiny("a")[:200], configured("/bin/true"))
    assert report.verdict == "bad"
    assert report.reason.startswith("not a sound GGUF file: ")


def test_a_node_with_a_server_serves_what_passes_its_test(node: Node) -> None:
    node.configure(llama_server() + 'version = "1.2"\n')
    runtime = {"engine": "openai", "version": ">=1"}
    node.publish(node.item("a:v1", tiny("a"), runtime=runtime), node.item("new:v1", tiny("b"), runtime=runtime | {"version": ">=2"}))
    assert node.run("apply").code == 0
    assert node.states() == {"a:v1": "active", "new:v1": "absent"}


# -- servers that misbehave --------------------------------------------------------------------------


@pytest.mark.parametrize("action", LIARS.values(), ids=LIARS)
def test_a_server_that_does_not_speak_the_api_fails_the_model(tmp_path: Path, action: str) -> None:
    text = configured(sys.executable, "-c", _LIAR.replace("{action}", action), "{port}")
    report = ran(tmp_path, tiny("a"), text, timeout="30s")
    assert report.verdict == "bad"
    assert "server" in report.reason


@pytest.mark.parametrize("action", ["os._exit(3)", "os.abort()"])
def test_a_server_that_ends_before_it_ever_answered_did_not_start(tmp_path: Path, action: str) -> None:
    report = ran(tmp_path, tiny("a"), configured(sys.executable, "-c", _LIAR.replace("{action}", action), "{port}"))
    assert report.verdict == "unable"
    assert report.reason.startswith("server did not start: ")


def test_a_server_that_never_ran_fails_no_model(tmp_path: Path) -> None:
    report = ran(tmp_path, tiny("a"), configured("/bin/false"))
    assert (report.verdict, report.reason) == ("unable", "server did not start: it ended with 1")


def test_a_server_that_hangs_when_it_is_asked_is_ended(tmp_path: Path) -> None:
    action = 'time.sleep(3600) if self.command == \'POST\' else self.reply(200, b\'{"data": [{"id": "m"}]}\')'
    text = configured(sys.executable, "-c", _LIAR.replace("import http", "import time, http").replace("{action}", action), "{port}")
    report = ran(tmp_path, tiny("a"), text, timeout="2s")
    assert (report.verdict, report.reason[:34]) == ("bad", "its test job did not end in time: ")


def test_a_server_that_is_never_ready_is_the_nodes_trouble(tmp_path: Path) -> None:
    report = ran(tmp_path, tiny("a"), configured("/bin/sleep", "3600", extra='ready_timeout = "1s"\n'))
    assert (report.verdict, report.reason) == ("unable", "server did not start: it was not ready in time")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("/nothing/here", "{model}"), "server did not start: [Errno 2] No such file or directory: '/nothing/here'"),
        (("/bin/sh", "-c", "exit 2"), "server did not start: it ended with 2"),
        (("/bin/sh", "-c", "nothing-here"), "server did not start: /bin/sh: 1: nothing-here: not found (it ended with 127)"),
        (("/bin/sh", "-c", "kill -TERM $$"), "it was killed by signal 15"),
    ],
)
def test_a_command_that_is_wrong_fails_no_model(tmp_path: Path, argv: tuple[str, ...], said: str) -> None:
    report = ran(tmp_path, tiny("a"), configured(*argv))
    assert report.verdict == "unable"
    assert report.reason.startswith(said)


REACHES = {
    "the network outside": "import socket; socket.create_connection(('127.0.0.1', {tcp}))",
    "a socket of this machine": "import socket; socket.socket(socket.AF_UNIX).connect({unix!r})",
    "a file of this machine": "open({secret!r})",
    "its own model": "open(sys.argv[2], 'ab')",
}


@pytest.mark.parametrize("attempt", REACHES.values(), ids=REACHES)
def test_a_server_reaches_nothing_outside(tmp_path: Path, attempt: str) -> None:
    (tmp_path / "doors").mkdir()
    with choose._probe_targets(tmp_path / "doors") as doors:
        lines = ("try:", f"    {attempt.format(**doors)}", "except OSError:", "    self.reply(500, b'refused')")
        action = "\n        ".join((*lines, "else:", "    self.reply(200, b'got through')"))
        report = ran(tmp_path, tiny("a"), configured(sys.executable, "-c", _LIAR.replace("{action}", action), "{port}", "{model}"))
    assert report.verdict == "bad"
    assert report.reason == "the server answered /v1/models with 500: refused"


@pytest.mark.parametrize(("version", "has"), [(0, "it has no Landlock"), (3, "its Landlock is version 3, and 4 is needed")])
def test_a_server_is_not_started_where_nothing_confines_its_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, has: str
) -> None:
    monkeypatch.setattr(confine, "landlock_version", lambda: version)
    report = ran(tmp_path, tiny("a"), configured("/bin/true") + '[smoke]\nsandbox = "landlock"\n')
    assert report.verdict == "unable"
    assert report.reason == f"sandbox-unavailable: landlock: this kernel cannot restrict a server's TCP connections: {has}"


# -- settings ----------------------------------------------------------------------------------------


def test_the_engine_is_there_when_a_server_is_configured(tmp_path: Path) -> None:
    assert "openai" not in jobs.make_tester(tmp_path).engines()
    assert jobs.make_tester(tmp_path, configured("/bin/true")).engines()["openai"] == "0"
    assert jobs.make_tester(tmp_path, configured("/bin/true", extra='version = "1.2"\n')).engines()["openai"] == "1.2"


@pytest.mark.parametrize(
    ("extra", "argv", "said"),
    [
        ('version = "latest"\n', "/bin/true", "not a version"),
        ('ready_timeout = "soon"\n', "/bin/true", "ready_timeout"),
        ("", "llama-server", "not an absolute path"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, extra: str, argv: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        jobs.make_tester(tmp_path, configured(argv, extra=extra))


def test_a_server_sees_its_own_folder_and_what_its_arguments_name_and_never_the_root(tmp_path: Path) -> None:
    program = tmp_path / "opt/llama/bin/llama-server"
    program.parent.mkdir(parents=True)
    program.touch()
    real = tmp_path / "elsewhere/bin/real"
    real.parent.mkdir(parents=True)
    real.touch()
    (program.parent / "linked").symlink_to(real)
    options = tmp_path / "options.json"
    options.touch()

    def folders(*argv: str) -> tuple[Path, ...]:
        return OpenAI().folders(settings_file.decode(configured(*argv).encode(), tmp_path).runtime)

    assert folders(str(program), "-m", "{model}", "--config", str(options)) == (tmp_path / "opt/llama", options)
    assert folders(str(program.parent / "linked")) == (tmp_path / "opt/llama", tmp_path / "elsewhere")
    assert folders("/usr/bin/env", "/", "/nothing/here") == ()


def test_the_entry_points_name_the_same_engines_as_the_code() -> None:
    import tomllib

    top = Path(__file__).resolve().parents[2]
    named = tomllib.loads((top / "pyproject.toml").read_text())["project"]["entry-points"][engines.GROUP]
    found = {name: f"{type(engine).__module__}:{type(engine).__name__}" for name, engine in engines.known().items()}
    assert named == found
