"""The sandbox in each mode for real, and broken on purpose: then nothing is believed, nothing is remembered, and no model is active."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reconciler.core import snapshot
from reconciler.core.errors import SandboxUnavailable
from reconciler.ports import TestJob
from reconciler.sandbox import choose, confine, probe
from reconciler.sandbox.process import Mode, Sandbox, SandboxJob
from reconciler.sandbox.supervision import ProcessResult
from tests.demand import needs_bubblewrap, needs_root, working
from tests.jobs import make_tester
from tests.node import Node, tiny

TOP = Path(__file__).resolve().parents[2]
MODES: tuple[Mode, ...] = ("bubblewrap", "landlock")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return working(request.param)


def in_sandbox(box: Sandbox, way: str, **job: Any) -> ProcessResult:
    seconds = job.pop("seconds", 60.0)
    return box.run(SandboxJob(module="tests.children.misbehave", job=job | {"way": way}, seconds=seconds, read=(TOP / "tests",)))


# -- each mode, unbroken -----------------------------------------------------------------------------


def test_every_door_is_shut_and_the_canary_can_be_read(mode: Mode) -> None:
    found = choose.probe(mode)
    assert found == choose.ProbeResult(mode=mode, works=True, detail="nothing outside was reachable")


def test_the_probe_finds_every_door_open_where_there_is_no_sandbox(tmp_path: Path) -> None:
    """A probe that cannot get through an open door would call any sandbox good."""
    with choose._probe_targets(tmp_path) as job:
        job |= {"nonce": "n", "namespaces": False, "server": False}
        ran = subprocess.run(
            [sys.executable, "-m", "reconciler.sandbox.probe"],
            input=json.dumps(job).encode(),
            capture_output=True,
            cwd=TOP,
            close_fds=False,
        )
    found = json.loads(ran.stdout)
    closed_anyway = {"dns", "new-namespace", "chmod-model"}  # no resolver here; who may make namespaces differs
    expected = {
        "tcp", "udp", "netlink", "unix-socket", "abstract-socket", "read-outside", "write-outside", "write-model", "truncate-model",
        "signal-parent", "signal-parent-thread", "limit-parent", "parent-environment", "descriptor", "shared-memory", "new-process",
        "new-program", "environment",
    }  # fmt: skip
    if os.getuid() != 0:
        expected -= {"write-model", "truncate-model"}  # its mode forbids
    assert set(found["succeeded"]) - closed_anyway >= expected
    assert found["loopback"] is True


def test_a_driver_may_name_its_threads(mode: Mode) -> None:
    """CUDA's does so by their files in proc, and does not come up (error 304) where it may not."""
    job, driver = {"way": "name_thread"}, (Path("/dev/null"),)
    ended = choose.make_sandbox(mode).run(
        SandboxJob(module="tests.children.misbehave", job=job, seconds=60.0, read=(TOP / "tests",), devices=driver)
    )
    assert ended.valid_answer is not None, ended.errors
    assert ended.valid_answer["name"] == "worker"


def test_a_child_sees_nothing_of_ours(mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "secret")
    (tmp_path / "secret").write_text("secret")
    with (tmp_path / "secret").open() as leaked:
        os.set_inheritable(leaked.fileno(), True)
        ended = in_sandbox(
            choose.make_sandbox(mode), "look", paths=["/etc/passwd", "/etc/shadow", str(tmp_path / "secret"), "/proc/1/environ"]
        )
    assert ended.valid_answer is not None
    assert not {"SECRET", "HOSTNAME", "USER"} & set(ended.valid_answer["environment"])
    assert ended.valid_answer["descriptors"] == [0, 1, 2]
    assert set(ended.valid_answer["there"]) <= {"/proc/1/environ"}  # in a namespace of its own that is bubblewrap's, which has only ours
    assert mode == "bubblewrap" or ended.valid_answer["there"] == []


def test_a_child_in_namespaces_has_no_power_and_goes_first_when_memory_is_short() -> None:
    ended = in_sandbox(choose.make_sandbox(working("bubblewrap")), "look", paths=[])
    assert ended.valid_answer is not None
    lines = dict(line.split(":\t", 1) for line in ended.valid_answer["status"].splitlines())
    assert (lines["CapEff"], lines["CapPrm"], lines["CapBnd"]) == ("0" * 16, "0" * 16, "0" * 16)
    assert (lines["NoNewPrivs"], lines["Seccomp"]) == ("1", "2")
    assert ended.valid_answer["oom"] == "1000"


def test_a_cache_of_kernels_can_be_read_and_a_model_cannot_change_it(mode: Mode, tmp_path: Path) -> None:
    """What one model's test could write there, the next model's would run."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "kernel").write_text("compiled")
    (cache / "kernel").chmod(0o666)
    cache.chmod(0o777)
    job = {"way": "fill", "folders": [str(cache)], "files": 1}
    given = {"CUDA_CACHE_PATH": str(cache), "CUDA_CACHE_DISABLE": "0"}
    box = choose.make_sandbox(mode)
    read = (TOP / "tests", cache)
    ended = box.run(SandboxJob(module="tests.children.misbehave", job=job, seconds=60.0, read=read, variables=given))
    assert ended.valid_answer is not None
    assert ended.valid_answer["done"] == {str(cache): 0}
    assert [path.name for path in cache.iterdir()] == ["kernel"]
    seen = {"way": "look", "paths": [str(cache / "kernel")]}
    ended = box.run(SandboxJob(module="tests.children.misbehave", job=seen, seconds=60.0, read=read, variables=given))
    assert ended.valid_answer is not None
    assert ended.valid_answer["there"] == [str(cache / "kernel")]
    assert {"CUDA_CACHE_PATH", "CUDA_CACHE_DISABLE"} <= set(ended.valid_answer["environment"])


def test_a_variable_that_is_not_the_job_s_own_reaches_no_child(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD"):
        monkeypatch.setenv(name, "")
    ended = in_sandbox(choose.make_sandbox(mode), "look", paths=[])
    assert ended.valid_answer is not None
    assert not {"LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD"} & set(ended.valid_answer["environment"])


def test_engines_may_have_threads(mode: Mode) -> None:
    ended = in_sandbox(choose.make_sandbox(mode), "thread")
    assert ended.valid_answer is not None
    assert ended.valid_answer["found"] == 16


def test_what_fills_the_disk_is_bounded(mode: Mode, tmp_path: Path) -> None:
    folders = ["/scratch", "/dev/shm", "/dev", "/tmp", "/var/tmp", "/", "/usr", str(tmp_path), str(TOP / "tests")]
    ended = in_sandbox(choose.make_sandbox(mode), "fill", folders=folders, files=96)
    assert ended.valid_answer is not None
    written = ended.valid_answer["done"]
    in_memory = ("/scratch", "/dev/shm") if mode == "bubblewrap" else ()
    assert all(written[folder] <= 64 for folder in in_memory)
    assert {folder: written[folder] for folder in folders if folder not in in_memory} == {
        folder: 0 for folder in folders if folder not in in_memory
    }
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_agreed_ends_the_child(mode: Mode, tmp_path: Path) -> None:
    job = {"way": "write_large", "path": str(tmp_path / "large")}
    ended = choose.make_sandbox(mode).run(
        SandboxJob(module="tests.children.misbehave", job=job, seconds=60.0, read=(TOP / "tests",), write=tmp_path, file_bytes=4 << 20)
    )
    assert ended.valid_answer is None
    assert (tmp_path / "large").stat().st_size <= 4 << 20


def test_a_server_sandbox_has_a_loopback_that_is_nobody_elses() -> None:
    working("bubblewrap")
    assert choose.probe("bubblewrap", server=True).works


def test_a_server_sandbox_without_namespaces_reaches_nothing_but_its_port() -> None:
    working("landlock")
    assert choose.probe("landlock", server=True).detail == "nothing outside was reachable"


def test_a_server_sandbox_is_not_to_be_had_where_nothing_restricts_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine, "landlock_version", lambda: 3)
    with pytest.raises(SandboxUnavailable, match="cannot restrict a server's TCP connections"):
        choose.choose("landlock", server=True)
    with pytest.raises(SandboxUnavailable, match="cannot restrict a server's TCP connections"):
        Sandbox("landlock").run(SandboxJob(module="x", job={}, seconds=1.0, server=True))


# -- broken on purpose -------------------------------------------------------------------------------

FORGER = """#!/bin/sh
echo confined
echo '{"nonce": "0", "open": [], "canary": ""}'
"""
#: Fakes of bubblewrap: what each does, and what the probe must say of it.
FAKES = {
    "runs-its-command": ('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n', "the probe reached"),
    "user-namespaces-off": (
        "#!/bin/sh\necho 'bwrap: Creating new namespace failed: nesting depth or max_*_namespaces exceeded (ENOSPC)' >&2\nexit 1\n",
        "ENOSPC",
    ),
    "runs-nothing": ("#!/bin/sh\nexit 0\n", "did not start"),
    "claims-to-have-confined": (FORGER, "did not start"),
    "cannot-run": ("#!/nothing/here\n", "did not start"),
    "dies": ("#!/bin/sh\nkill -SEGV $$\n", "did not start"),
}


def fake(folder: Path, text: str) -> Path:
    path = folder / "bwrap"
    path.write_text(text)
    path.chmod(0o755)
    os.chown(path, 0, 0)
    return path


@pytest.fixture(params=FAKES)
def broken(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine whose only bubblewrap is a fake; the sentence that must name it."""
    needs_root("to make a file that is root's")
    text, said = FAKES[request.param]
    monkeypatch.setattr(choose, "BUBBLEWRAP", (fake(tmp_path, text),))
    return said


def test_a_fake_bubblewrap_is_never_believed_nor_remembered(broken: str, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(SandboxUnavailable, match=broken):
            choose.choose("bubblewrap", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_with_a_fake_bubblewrap_the_model_stays_pending(broken: str, node: Node) -> None:
    node.configure('[smoke]\nsandbox = "bubblewrap"\n')
    _stays_pending(node)


def test_a_bubblewrap_that_executes_all_is_caught_through_the_doors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own filter still stands behind it: what gets through is the file system, and that is enough to be caught."""
    needs_root("to make a file that is root's")
    monkeypatch.setattr(choose, "BUBBLEWRAP", (fake(tmp_path, FAKES["runs-its-command"][0]),))
    found = choose.probe("bubblewrap")
    assert not found.works
    assert {"read-outside", "write-outside"} <= set(found.detail.removeprefix("the probe reached: ").split(", "))


def test_a_server_beside_a_fake_bubblewrap_reaches_the_machine_and_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_root("to make a file that is root's")
    monkeypatch.setattr(choose, "BUBBLEWRAP", (fake(tmp_path, FAKES["runs-its-command"][0]),))
    found = choose.probe("bubblewrap", server=True)
    assert not found.works
    assert {"tcp", "abstract-socket", "signal-parent"} <= set(found.detail.removeprefix("the probe reached: ").split(", "))


def test_a_sandbox_without_its_window_is_not_taken_for_a_perfect_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_root("to make a file that is root's")
    real = needs_bubblewrap()
    lines = (
        f"#!{sys.executable} -I",
        "import os, sys",
        "canary = next(word for word in sys.argv if word.endswith('/canary'))",
        "at = sys.argv.index(canary) - 1",
        f"os.execv({str(real)!r}, [{str(real)!r}, *sys.argv[1:at], *sys.argv[at + 3:]])",
    )
    monkeypatch.setattr(choose, "BUBBLEWRAP", (fake(tmp_path, "\n".join(lines)),))
    assert choose.probe("bubblewrap").detail == "the probe could not read its canary"


@pytest.mark.parametrize("mode_bits", [0o775, 0o757, 0o777])
def test_a_bubblewrap_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode_bits: int) -> None:
    path = needs_bubblewrap()
    copy = tmp_path / "bwrap"
    shutil.copy(path, copy)
    copy.chmod(mode_bits)
    monkeypatch.setattr(choose, "BUBBLEWRAP", (copy,))
    with pytest.raises(SandboxUnavailable, match="not root's alone"):
        choose.choose("bubblewrap")


def test_a_bubblewrap_that_is_not_roots_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = needs_bubblewrap()
    copy = tmp_path / "bwrap"
    shutil.copy(path, copy)
    if os.getuid() == 0:
        os.chown(copy, 65534, 65534)
    monkeypatch.setattr(choose, "BUBBLEWRAP", (copy,))
    with pytest.raises(SandboxUnavailable, match="not root's alone"):
        choose.choose("bubblewrap")


def test_bubblewrap_is_not_looked_for_in_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_one = tmp_path / "bwrap"
    fake_one.write_text("#!/bin/sh\nexit 0\n")
    fake_one.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(choose, "BUBBLEWRAP", (tmp_path / "nowhere",))
    assert choose.find_bubblewrap() == "bubblewrap is not installed"
    with pytest.raises(SandboxUnavailable, match="not installed"):
        choose.choose("bubblewrap")


def test_without_bubblewrap_the_model_stays_pending(node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choose, "BUBBLEWRAP", (tmp_path / "nowhere",))
    node.configure('[smoke]\nsandbox = "bubblewrap"\n')
    _stays_pending(node)


def test_without_bubblewrap_landlock_does_it(node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    working("landlock")
    monkeypatch.setattr(choose, "BUBBLEWRAP", (tmp_path / "nowhere",))
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    assert node.run("status", "a:v1", "--json").json["models"][0]["test"]["sandbox"] == "landlock"


def test_a_sandbox_that_comes_back_lets_the_model_through(node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs_bubblewrap()
    node.configure('[smoke]\nsandbox = "bubblewrap"\n')
    with monkeypatch.context() as lacking:
        lacking.setattr(choose, "BUBBLEWRAP", (tmp_path / "nowhere",))
        _stays_pending(node)
    assert node.run("apply").code == 0
    assert node.states() == {"a:v1": "active"}


def test_a_sandbox_that_breaks_after_its_probe_is_probed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_root("to make a file that is root's")
    real = needs_bubblewrap()
    good = FAKES["user-namespaces-off"][0]
    switch = tmp_path / "broken"
    text = good.replace("#!/bin/sh\n", f'#!/bin/sh\nif [ ! -e {switch} ]; then exec {real} "$@"; fi\n')
    monkeypatch.setattr(choose, "BUBBLEWRAP", (fake(tmp_path, text),))
    tester = make_tester(tmp_path, '[smoke]\nsandbox = "bubblewrap"\n')
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/m.gguf").write_bytes(tiny("a"))
    smoke = snapshot.Smoke(max_tokens=2)
    job = TestJob(model="a:v1", tree=tmp_path / "tree", entrypoint="m.gguf", runtime=snapshot.Runtime(engine="llama-cpp"), smoke=smoke)
    assert tester.test(job).verdict == "passed"
    switch.touch()

    first, second = tester.test(job), tester.test(job)

    assert (first.verdict, second.verdict) == ("unable", "unable")
    assert first.reason.startswith("sandbox-unavailable: bwrap: Creating new namespace failed")
    assert second.reason.startswith("sandbox-unavailable: bubblewrap: it did not start")
    switch.unlink()
    assert tester.test(job).verdict == "passed"


# -- the real thing, in a process that has no user namespaces or no Landlock -------------------------

_NO_NAMESPACES = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'


def test_with_user_namespaces_off_the_model_stays_pending(node: Node) -> None:
    """The limit is that of a namespace made for this: the machine's own is not touched."""
    needs_bubblewrap()
    unshared = ["unshare", "--user", "--map-root-user", "sh", "-c", _NO_NAMESPACES, "sh"]
    if subprocess.run([*unshared, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no user namespace to take away: unshare --user --map-root-user")
    node.configure('[smoke]\nsandbox = "bubblewrap"\n')
    _stays_pending_in(node, unshared)


def test_without_landlock_the_model_stays_pending(node: Node) -> None:
    node.configure('[smoke]\nsandbox = "landlock"\n')
    _stays_pending_in(node, [sys.executable, "-m", "tests.children.without_landlock"])


def _stays_pending(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    ran = node.run("apply", "--json")
    _check_pending(node, ran.code, ran.events)


def _stays_pending_in(node: Node, wrapper: list[str]) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    command = [sys.executable, "-m", "reconciler", "apply", "--json", "--config", str(node.folder / "reconcile.toml")]
    ran = subprocess.run([*wrapper, *command], capture_output=True, cwd=TOP, timeout=120)
    _check_pending(node, ran.returncode, [json.loads(line) for line in ran.stdout.splitlines()])


def _check_pending(node: Node, code: int, events: list[dict[str, Any]]) -> None:
    assert code == 0  # nothing failed; it is tried again
    assert node.states() == {"a:v1": "pending"}
    assert "sandbox-unavailable" in {event["kind"] for event in events if event["type"] == "incident"}
    assert not (node.store / "active/models/a").exists()
    assert not (node.store / "active/index.json").exists() or node.index()["models"] == []


# -- what is remembered ------------------------------------------------------------------------------


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Mode]:
    """Each real probe is noted."""
    made: list[Mode] = []
    real = choose.probe

    def noted(mode: Mode, *, server: bool = False) -> choose.ProbeResult:
        made.append(mode)
        return real(mode, server=server)

    monkeypatch.setattr(choose, "probe", noted)
    return made


def test_a_good_sandbox_is_probed_once(mode: Mode, tmp_path: Path, probes: list[Mode]) -> None:
    for _ in range(3):
        assert choose.choose(mode, tmp_path).mode == mode
    assert probes == [mode]


def test_another_boot_kernel_bubblewrap_or_version_of_ourselves_is_probed_anew(tmp_path: Path, probes: list[Mode]) -> None:
    working("landlock")
    choose.choose("landlock", tmp_path)
    path = tmp_path / "sandbox-landlock.json"
    key, known = json.loads(path.read_bytes())
    for index in range(len(key.split(" "))):
        words = key.split(" ")
        words[index] += "x"
        path.write_bytes(msgspec.json.encode((" ".join(words), known)))
        choose.choose("landlock", tmp_path)
    assert len(probes) == 1 + len(key.split(" "))
    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() in key
    assert os.uname().release in key


def test_another_bubblewrap_is_another_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_root("to make a file that is root's")
    real = needs_bubblewrap()
    path = fake(tmp_path, f'#!/bin/sh\nexec {real} "$@"\n')
    monkeypatch.setattr(choose, "BUBBLEWRAP", (path,))
    choose.choose("bubblewrap", tmp_path / "cache")
    fake(tmp_path, FAKES["runs-its-command"][0])
    with pytest.raises(SandboxUnavailable, match="the probe reached"):
        choose.choose("bubblewrap", tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b'["x"]', b"\xff", b'["", {"mode": "landlock", "works": true, "detail": ""}]'])
def test_a_damaged_memory_is_no_memory(tmp_path: Path, probes: list[Mode], content: bytes) -> None:
    working("landlock")
    (tmp_path / "sandbox-landlock.json").write_bytes(content)
    assert choose.choose("landlock", tmp_path).mode == "landlock"
    assert probes == ["landlock"]


def test_a_memory_cannot_name_the_program_that_guards_us(tmp_path: Path) -> None:
    """What is run is found anew each time: the cache lies in the store, which more people may be able to write."""
    working("bubblewrap")
    choose.choose("bubblewrap", tmp_path)
    path = tmp_path / "sandbox-bubblewrap.json"
    key, known = json.loads(path.read_bytes())
    path.write_bytes(json.dumps([key, known | {"bubblewrap": "/tmp/evil"}]).encode())
    assert choose.choose("bubblewrap", tmp_path)._bubblewrap == choose.find_bubblewrap()


# -- the filter, as the kernel would run it ------------------------------------------------------------


def verdict(program: list[bytes], number: int, *arguments: int, architecture: int = 0xC000003E) -> int:
    """Interpret classic BPF over one system call."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    at = accumulator = 0
    while True:
        code, true, false, value = struct.unpack("HBBI", program[at])
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == 0x06:
            return int(value)
        else:
            taken = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += true if taken else false


ALLOW, DENY, ABSENT, KILL = 0x7FFF0000, 0x0005000D, 0x00050026, 0x80000000


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_says_for_every_call_what_it_should(machine: str) -> None:
    architecture, numbers = confine._MACHINES[machine]
    plain = confine._filter(architecture, numbers, server=False, writes=False)
    server = confine._filter(architecture, numbers, server=True, writes=False)

    def answers(program: list[bytes], name: str, *arguments: int) -> int:
        return verdict(program, numbers[name], *arguments, architecture=architecture)

    special = {"clone", "clone3", "tgkill", "prlimit64"}
    for name in set(numbers) - special:
        assert answers(plain, name) == DENY, name
    assert answers(plain, "clone3") == answers(server, "clone3") == ABSENT
    assert answers(plain, "clone", 0x3D0F00) == ALLOW  # as pthread_create(3) asks
    assert answers(plain, "clone", 17) == DENY  # as fork(3) does
    assert answers(server, "clone", 17) == ALLOW
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert answers(plain, "clone", flag | 0x10000) == answers(server, "clone", flag | 17) == DENY
    assert answers(plain, "tgkill", os.getpid()) == answers(plain, "prlimit64", 0) == ALLOW
    assert answers(plain, "tgkill", os.getppid()) == answers(plain, "prlimit64", os.getppid()) == DENY
    assert [answers(server, "socket", family) for family in (1, 2, 10, 16, 17, 40)] == [ALLOW, ALLOW, ALLOW, DENY, DENY, DENY]
    route = [answers(server, "socket", 16, kind, protocol) for kind in (2, 3, 0x80003, 5) for protocol in (0, 16)]
    assert route == [ALLOW, DENY, ALLOW, DENY, ALLOW, DENY, DENY, DENY]  # getifaddrs(3), and no generic netlink
    for name in ("ptrace", "bpf", "mount", "keyctl", "io_uring_setup", "chmod", "unshare"):
        assert name not in numbers or answers(server, name) == DENY
    writing = confine._filter(architecture, numbers, server=False, writes=True)
    assert [answers(writing, "fchmod", 3, bits) for bits in (0o444, 0o755, 0o666, 0o4755, 0o10444)] == [ALLOW, ALLOW, DENY, DENY, DENY]
    ordinary = max(number for number in range(300) if number not in numbers.values())
    assert verdict(plain, ordinary, architecture=architecture) == ALLOW
    assert verdict(plain, ordinary, architecture=architecture ^ 1) == KILL
    assert verdict(plain, 0x40000000 | ordinary, architecture=architecture) == KILL


def test_the_filters_numbers_are_this_machines() -> None:
    """Each denied call is made by its number, through the C library's syscall(2) against its header, where the header is installed."""
    header = next((path for path in map(Path, ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h"))
                   if path.exists()), None)  # fmt: skip
    machine = os.uname().machine
    if machine not in confine._MACHINES:
        pytest.skip(f"no system call filter is made for {machine}: such a machine gets no sandbox of the Landlock kind")
    if header is None:
        pytest.skip("the kernel's headers are not installed: linux-libc-dev")
    told = {
        words[1].removeprefix("__NR_").removeprefix("3264_"): int(words[2])
        for line in header.read_text().splitlines()
        if len(words := line.split()) == 3 and words[0] == "#define" and words[1].startswith("__NR") and words[2].isdigit()
    }
    numbers = confine._MACHINES[machine][1]
    assert {name: told[name] for name in numbers if name in told} == {name: number for name, number in numbers.items() if name in told}
    assert len(set(numbers) & set(told)) > 50


def test_a_machine_that_is_not_known_gets_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(confine.SetupFailed, match="riscv64"):
        confine._seccomp(None, server=False, writes=False)


# -- the probe's own honesty ---------------------------------------------------------------------------


def test_the_probe_mistakes_nobody_in_its_namespace_for_the_parent() -> None:
    with pytest.raises(OSError):
        probe._parent({"parent": os.getpid(), "namespaces": True})
    assert probe._parent({"parent": os.getpid(), "namespaces": False}) == os.getpid()


def test_the_doors_are_real(tmp_path: Path) -> None:
    with choose._probe_targets(tmp_path) as job:
        with socket.create_connection(("127.0.0.1", job["tcp"]), timeout=5):
            pass
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.settimeout(5)
            sender.sendto(b"x", ("127.0.0.1", job["udp"]))
            assert sender.recv(1) == b"y"
        probe._unix(job["unix"])
        probe._unix("\0" + job["abstract"])
        assert os.environ[job["variable"]] == "secret"
        assert stat.S_IMODE(Path(job["canary"]).stat().st_mode) == 0o444
        variable = job["variable"]
    assert variable not in os.environ
