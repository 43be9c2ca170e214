"""Stores in places that nobody thought of: behind a link, across disks, under any umask, read-only, and with few descriptors."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.core.errors import StoreError
from reconciler.store import serving
from tests.crash.scenario import REFUSED, STAY, UNTOUCHED, V1, Scene, child
from tests.demand import needs_root
from tests.node import Node, tiny
from tests.storenode import memory, traces


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        yield Path(folder)


@pytest.fixture
def end(root: Path) -> dict[str, object]:
    """Where an untouched run in an ordinary place ends."""
    return ended(Scene(root / "ordinary"))


def ended(scene: Scene) -> dict[str, object]:
    scene.prepare()
    scene.run()
    assert scene.faults() == []
    return scene.end()


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777], ids=oct)
def test_readers_can_read_whatever_the_umask(root: Path, end: dict[str, object], umask: int) -> None:
    scene = Scene(root / "s")
    scene.root.mkdir()
    before = os.umask(umask)
    try:
        found = ended(scene)
    finally:
        os.umask(before)

    assert found == end
    layout = scene.node.layout
    private = {layout.staging, layout.quarantine, *layout.staging.rglob("*")}
    for path in layout.root.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path in private or path.is_symlink():
            continue
        if path.is_dir():
            assert mode == 0o755, path
        elif layout.blobs in path.parents or layout.trees in path.parents:
            assert mode == 0o444, path
        assert mode & 0o022 == 0, path
    assert stat.S_IMODE(layout.staging.stat().st_mode) == 0o700


def test_a_store_behind_a_link(root: Path, end: dict[str, object]) -> None:
    (root / "real").mkdir()
    (root / "s").symlink_to(root / "real")

    assert ended(Scene(root / "s")) == end


def test_a_store_that_is_a_link_itself(root: Path, end: dict[str, object]) -> None:
    (root / "elsewhere").mkdir()
    (root / "s").mkdir()
    (root / "s/store").symlink_to(root / "elsewhere")

    assert ended(Scene(root / "s")) == end


def test_a_store_under_a_name_with_anything_in_it(root: Path, end: dict[str, object]) -> None:
    scene = Scene(root / "a b?c#d%20e'f\"g\nh\\ä")

    found = ended(scene)

    for_servers = {"served", "lagging"}  # an INI file cannot name a path with a line break in it
    assert {key: found[key] for key in found.keys() - for_servers} == {key: end[key] for key in end.keys() - for_servers}
    assert found["lagging"] == ["main"]
    assert [bool(server.error) for server in serving.read(scene.node.layout).servers if server.name == "main"] == [True]


def test_a_store_that_was_moved_serves_and_goes_on(root: Path, end: dict[str, object]) -> None:
    scene = Scene(root / "s")
    scene.prepare()
    scene.root.rename(root / "moved")
    moved = Scene(root / "moved")
    assert moved.faults() == []

    moved.run()

    assert moved.faults() == []
    assert moved.end() == end


def test_cold_storage_on_another_disk(root: Path, tmp_path: Path, end: dict[str, object]) -> None:
    if root.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system here: /dev/shm and the temporary folder are the same")
    (root / "s").mkdir()
    (tmp_path / "cold").mkdir()
    (root / "s/cold").symlink_to(tmp_path / "cold")
    scene = Scene(root / "s")

    assert ended(scene) == end

    items = (scene.node.item("chat:v1", V1, serve=False), scene.node.item("stay:v1", STAY, serve=False))
    again = scene.node.lock(*items)
    scene.node.run(again)
    assert set(scene.node.active()) == {"chat:v1", "stay:v1"}


def test_a_store_on_another_disk_than_the_lock(node: Node, root: Path, tmp_path: Path) -> None:
    if root.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system here: /dev/shm and the temporary folder are the same")
    node.configure(f'path = "{root}/store"\n')
    node.publish(node.item("a:v1", tiny("a")))

    assert node.run("apply").code == 0
    assert node.run("plan", "--detailed-exitcode").code == 0
    assert node.run("lock", "--check").code == 0
    assert (root / "store/active/models/a/v1/a.gguf").read_bytes() == tiny("a")


def test_a_store_of_another_user_is_refused_before_anything_changes(root: Path, end: dict[str, object]) -> None:
    needs_root("to be somebody else")
    root.chmod(0o755)
    scene = Scene(root / "s")
    scene.prepare()
    before = traces(scene.root)

    def by_another() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        scene.run()

    assert child(by_another) == REFUSED
    assert traces(scene.root) == before
    scene.run()
    assert scene.end() == end


READ_ONLY = """
import sys
from pathlib import Path
from reconciler.core.errors import StoreError
from tests.crash.scenario import Scene
scene = Scene(Path(sys.argv[1]))
assert scene.faults() == []
assert scene.node.plan(scene.second).changes
try:
    scene.run()
except StoreError as refused:
    print(refused.message)
assert scene.faults() == []
assert scene.node.internet.asked == []
"""


def test_a_read_only_store_is_planned_and_refused_before_any_download(root: Path) -> None:
    """As on a disk that the kernel turned read-only after an error: also root may not write."""
    scene = Scene(root / "s")
    scene.prepare()
    namespace = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no mount namespace: unshare --mount --map-root-user")
    commands = f"mount --bind {root}/s {root}/s && mount -o remount,bind,ro {root}/s && exec {sys.executable} -c '{READ_ONLY}' {root}/s"

    ran = subprocess.run([*namespace, "sh", "-c", commands], capture_output=True, text=True, timeout=120)

    assert ran.returncode == 0, ran.stderr
    assert "Read-only file system" in ran.stdout


@pytest.mark.parametrize("files", [64, 32, 24, 20, 18, 16, 14, 12])
def test_few_descriptors_are_enough_or_refused(root: Path, end: dict[str, object], files: int) -> None:
    scene = Scene(root / "s")
    scene.prepare()

    def run() -> None:
        for fd in range(3, 256):
            if _is_open(fd):
                os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        Scene(root / "s").run()

    code = child(run)

    assert code in {UNTOUCHED, REFUSED}
    if files >= 32:
        assert code == UNTOUCHED
    assert scene.faults() == []
    scene.run()
    assert scene.end() == end


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("size", [100, 4000, 5000, 8192, 20_000])
def test_a_limit_on_the_size_of_files_is_a_refusal(root: Path, end: dict[str, object], size: int) -> None:
    scene = Scene(root / "s")
    scene.prepare()

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself starts
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        Scene(root / "s").run()

    assert child(run) in {UNTOUCHED, REFUSED}
    assert scene.faults() == []
    scene.run()
    assert scene.end() == end


def test_two_runs_at_once_are_one_after_the_other(root: Path, end: dict[str, object]) -> None:
    scene = Scene(root / "s")
    scene.prepare()
    pids = []
    for _ in range(6):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                signal.alarm(60)
                Scene(root / "s").run()
                code = UNTOUCHED
            except StoreError:
                code = REFUSED
            finally:
                os._exit(code)
        pids.append(pid)

    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    assert set(codes) <= {UNTOUCHED, REFUSED}
    assert UNTOUCHED in codes
    assert scene.faults() == []
    assert scene.end() == end
