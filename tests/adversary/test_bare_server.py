"""A hostile server without namespaces: what Landlock and the filter leave it, on a machine whose network and processes it shares."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from reconciler.sandbox import choose, confine
from tests import jobs
from tests.adversary.test_sandbox import ABSENT, ALLOW, DENY, KILL, verdict
from tests.demand import working
from tests.functional.test_server_engines import PYTHON, SERVE, table, told
from tests.node import tiny

NOTHING = 0x00050000
#: For how long the programs that a server starts would sleep: by it they are known, and not taken for those of tests beside this one.
SLEEP = str(4_000_000 + os.getpid())


@pytest.fixture(autouse=True)
def _landlock() -> None:
    working("landlock")
    if why := confine.no_tcp_rules():
        pytest.skip(f"a server is not tested under Landlock here: {why}")  # test_server_engines tests that a model is pending then


@pytest.fixture(autouse=True)
def _no_sleeper_stays() -> Iterator[None]:
    yield
    for pid in _sleepers():
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def doors(tmp_path: Path) -> Iterator[dict[str, Any]]:
    (tmp_path / "doors").mkdir()
    with choose._probe_targets(tmp_path / "doors") as found:
        yield found


#: What it tries, and how it is refused.
ATTEMPTS = {
    "another-port": "socket.create_connection(('127.0.0.1', {tcp}), timeout=2)",
    "the-port-that-it-listens-on": "socket.create_connection(('127.0.0.1', Handler.options.port), timeout=2)",
    "the-port-of-another-host": "socket.create_connection(('192.0.2.1', Handler.options.port), timeout=2)",
    "fast-open": "socket.socket().sendto(b'x', 0x20000000, ('127.0.0.1', {tcp}))",
    "fast-open-by-message": "socket.socket().sendmsg([b'x'], [], 0x20000000, ('127.0.0.1', {tcp}))",
    "another-port-to-listen-on": "socket.create_server(('127.0.0.1', 0))",
    "a-datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "a-datagram-over-ipv6": "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)",
    "multipath-tcp": "socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)",
    "sctp": "socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)",
    "a-unix-socket": "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect({unix!r})",
    "an-abstract-socket": "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect('\\0' + {abstract!r})",
    "a-pair-that-sends-anywhere": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "a-file": "open({secret!r}).read()",
    "the-model": "open(Handler.options.model, 'ab')",
    "the-models-mode": "os.chmod(Handler.options.model, 0o777)",
    "the-environment-of-its-parent": "open(f'/proc/{parent}/environ').read()",
    "a-signal-to-the-program": "os.kill({parent}, 0)",
    "a-signal-to-its-worker": "os.kill(os.getppid(), 19)",
    "the-limits-of-the-program": "resource.prlimit({parent}, resource.RLIMIT_NOFILE)",
    "the-processors-of-the-program": "os.sched_setaffinity({parent}, [0])",
    "a-namespace": "ctypes.CDLL(None, use_errno=True).unshare(0x10000000) and open('/nothing/refused')",
    "the-memory-of-its-parent": "open(f'/proc/{parent}/mem', 'rb').read(1)",
}
_MODULES = "global os, socket, resource, ctypes; import os, socket, resource, ctypes"


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
def test_a_bare_server_reaches_nothing(tmp_path: Path, doors: dict[str, Any], attempt: str) -> None:
    found = told(tmp_path, attempt.format(**doors), mode="landlock", begin=_MODULES)
    assert found.startswith(("PermissionError: ", "FileNotFoundError: ")), found


def test_each_of_these_doors_is_open_to_a_program_that_nothing_confines(doors: dict[str, Any]) -> None:
    """An attempt that fails anywhere would show nothing."""
    open_ = ("another-port", "fast-open", "another-port-to-listen-on", "a-datagram", "a-unix-socket", "a-file", "netlink")
    lines = ["import os, socket, resource, ctypes", *(ATTEMPTS[name].format(**doors) for name in open_), "print('open')"]
    ran = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert ran.stdout == "open\n", ran.stderr


def test_nothing_that_it_started_is_left(tmp_path: Path) -> None:
    """In a session of its own, as daemons are: killing a process group would miss it."""
    begin = f"import subprocess; subprocess.Popen(['/bin/sleep', '{SLEEP}'], start_new_session=True)"
    assert told(tmp_path, "1", mode="landlock", begin=begin) == "1"
    assert _sleepers() == []


def test_nothing_that_it_started_is_left_when_the_program_is_killed(tmp_path: Path) -> None:
    begin = f"import subprocess; subprocess.Popen(['/bin/sleep', '{SLEEP}'], start_new_session=True)"
    text = table("vllm", "--delay=60", f"--begin={begin}", extra='ready_timeout = "60s"\n') + '[smoke]\nsandbox = "landlock"\n'
    lines = (
        "import sys; from pathlib import Path; from tests import jobs; from tests.node import tiny",
        f"folder = Path({str(tmp_path)!r}); tester = jobs.make_tester(folder, {text!r})",
        "tester.test(jobs.job(folder, tiny('a'), engine='vllm'))",
    )
    top = Path(__file__).resolve().parents[2]
    child = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], cwd=top)
    try:
        _until(lambda: _sleepers() != [])
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    _until(lambda: _sleepers() == [])


def _sleepers() -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            found += [process.pid] if process.cmdline()[-2:] == ["/bin/sleep", SLEEP] else []
        except psutil.Error:
            continue
    return found


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _until(true: Any) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if true():
            return
        time.sleep(0.1)  # a process of another session tells nobody here what it did
    pytest.fail("it did not come true")


def test_it_writes_to_its_own_folder_alone_and_no_more_than_it_may(tmp_path: Path) -> None:
    where = "open(os.environ['HOME'] + '/x', 'wb').write(b'x')"
    assert told(tmp_path, where, mode="landlock", begin=_MODULES) == "1"
    begin = "import os\nfor n in range(40): open(f'{os.environ[\"HOME\"]}/{n}', 'wb').write(bytes(1 << 20))"
    text = table("vllm", f"--begin={begin}", "--delay=5", extra='file_size = "8MiB"\n') + '[smoke]\nsandbox = "landlock"\n'
    report = jobs.make_tester(tmp_path, text).test(jobs.job(tmp_path, tiny("a"), engine="vllm"))
    assert report.verdict == "unable"
    assert "[runtime] file_size" in report.reason


def test_its_folder_is_gone_afterwards(tmp_path: Path) -> None:
    place = told(tmp_path, "os.environ['HOME']", mode="landlock", begin=_MODULES)
    assert "reconcile-server-" in place
    assert not Path(place).exists()


def test_a_program_of_another_user_that_takes_the_port_is_not_mistaken_for_the_server(tmp_path: Path) -> None:
    """It sees the port in the command line, listens first, and answers as a server would, for a model that is none."""
    if os.getuid() != 0:
        pytest.skip("not root: it takes root to run a program as another user")
    stranger = (
        "import http.server, json, sys\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        body = json.dumps({'data': [{'id': 'm'}], 'choices': [{'text': 'Paris'}], 'usage': {'completion_tokens': 9}}).encode()\n"
        "        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)\n"
        "    do_POST = do_GET\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
    )
    choose.choose("landlock", tmp_path / "store/cache", server=True)  # its probe takes a port of its own
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    child = subprocess.Popen(["/usr/bin/python3", "-c", stranger, str(port)], user=65534, group=65534, cwd="/")
    try:
        _until(lambda: _answers(port))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("reconciler.loopback.free_port", lambda: port)
            text = f"[runtime.vllm]\nargv = {json.dumps([PYTHON, SERVE, '--model={model}', '--port={port}', '--delay=5'])}\n"
            tester = jobs.make_tester(tmp_path, text + '[smoke]\nsandbox = "landlock"\n')
            report = tester.test(jobs.job(tmp_path, tiny("a"), engine="vllm", expect={"text": "Paris"}))
    finally:
        child.kill()
        child.wait()
    assert report.verdict == "unable"
    assert "another user's program has port" in report.reason


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_a_bare_server_says_for_every_call_what_it_should(machine: str) -> None:
    architecture, numbers = confine._MACHINES[machine]
    scoped, unscoped = (confine._bare_filter(machine, scoped=one) for one in (True, False))

    def answers(program: list[bytes], name: str, *arguments: int) -> int:
        return verdict(program, numbers[name], *arguments, architecture=architecture)

    for program in (scoped, unscoped):
        assert [answers(program, "socket", 2, kind, protocol) for kind in (1, 0x80801, 2, 3, 5) for protocol in (0, 6, 262)] == [
            ALLOW, ALLOW, DENY, ALLOW, ALLOW, DENY, *[DENY] * 9,
        ]  # fmt: skip
        assert [answers(program, "socket", family, 1, 0) for family in (1, 2, 10, 16, 17, 40)] == [DENY, ALLOW, ALLOW, DENY, DENY, DENY]
        assert [answers(program, "socketpair", 1, kind) for kind in (1, 0x80001, 2, 5)] == [ALLOW, ALLOW, DENY, DENY]
        assert answers(program, "setsid") == answers(program, "setpgid", 0, 0) == NOTHING
        assert answers(program, "clone3") == ABSENT
        assert answers(program, "clone", 17) == answers(program, "execve") == answers(program, "connect", 3) == ALLOW
        assert answers(program, "clone", 0x10000000 | 17) == DENY
        assert answers(program, "prlimit64", 0) == answers(program, "sched_setaffinity", 0) == ALLOW
        assert answers(program, "prlimit64", os.getppid()) == answers(program, "sched_setaffinity", os.getppid()) == DENY
        for number, argument in confine._SENDING[machine].items():
            flags = [0] * argument
            assert verdict(program, number, *flags, 0x4000, architecture=architecture) == ALLOW
            assert verdict(program, number, *flags, 0x20004000, architecture=architecture) == DENY
        for name in ("ptrace", "bpf", "mount", "keyctl", "io_uring_setup", "unshare", "process_vm_readv", "pidfd_send_signal", "fchmod"):
            assert answers(program, name) == DENY
        ordinary = max(number for number in range(300) if number not in (*numbers.values(), *confine._SENDING[machine]))
        assert verdict(program, ordinary, architecture=architecture) == ALLOW
        assert verdict(program, ordinary, architecture=architecture ^ 1) == KILL
    assert answers(scoped, "kill", os.getppid()) == ALLOW  # Landlock keeps it inside
    assert answers(unscoped, "kill", os.getppid()) == answers(unscoped, "tkill", os.getppid()) == DENY
    assert answers(unscoped, "kill", 0) == ALLOW  # its own process group
