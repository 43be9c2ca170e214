"""What earlier runs, crashes and other users left in staging is neither trusted nor followed; and a disk that is full."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from reconciler.core.errors import StoreBusy, StoreError
from reconciler.fetch import resolver
from reconciler.fetch import staging as stagings
from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.fetch.staging import Staging
from reconciler.ports import FetchFailed
from tests.fetching import FAST, LARGE, SMALL, EventRecorder, collect, files_under, good, name_of, some, want
from tests.hostile_server import HostileServer, honest, no_ranges

DATA = some(LARGE, 1)
NAME = name_of(DATA)


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer() as running:
        running.on("/x", honest(DATA, rate=8 << 20))  # at full speed, megabytes lie in buffers before anybody looks at them
        yield running


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "staging"
    path.mkdir(mode=0o700)
    return path


def attempt(root: Path, name: str = "left") -> Path:
    path = root / NAME.replace(":", "-") / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def fetch(root: Path, server: HostileServer, recorder: EventRecorder | None = None) -> Path:
    fetcher = Aria2Fetcher(root, FAST)
    try:
        return good(collect(fetcher, [want(DATA, server.url("/x"))], recorder)[NAME], DATA).path
    finally:
        fetcher.close()


def test_the_front_of_the_file_is_continued(root: Path, server: HostileServer) -> None:
    (attempt(root) / "data").write_bytes(DATA[: 4 << 20])
    fetch(root, server)
    assert server.sent("/x") < LARGE // 2


def test_a_file_with_holes_is_continued_where_they_are(root: Path, server: HostileServer) -> None:
    with (attempt(root) / "data").open("wb") as file:
        os.pwrite(file.fileno(), DATA[: 1 << 20], 0)
        os.pwrite(file.fileno(), DATA[3 << 20 :], 3 << 20)
    fetch(root, server)
    assert (2 << 20) < server.sent("/x") < (3 << 20)


def test_a_whole_file_is_hashed_and_nothing_is_fetched(root: Path, server: HostileServer) -> None:
    (attempt(root) / "data").write_bytes(DATA)
    fetcher = Aria2Fetcher(root, FAST)
    try:
        outcome = good(collect(fetcher, [want(DATA, server.url("/x"))])[NAME], DATA)
    finally:
        fetcher.close()
    assert outcome.sources == ()
    assert server.requests == []


@pytest.mark.parametrize(
    "left", [bytes(LARGE), bytes(1 << 20), DATA[:-1] + b"x", some(3 << 20, 9)], ids=["zeros", "some zeros", "one byte", "other"]
)
def test_wrong_bytes_of_an_earlier_run_cost_a_download_and_blame_nobody(root: Path, server: HostileServer, left: bytes) -> None:
    """Zeros of the full length are what a crash after a preallocation leaves, and what aria2 calls complete."""
    (attempt(root) / "data").write_bytes(left)
    recorder = EventRecorder()
    fetch(root, server, recorder)
    assert [(it.kind, it.source) for it in recorder.incidents] == [("hash-mismatch", "")]


def too_long(path: Path) -> None:
    (path / "data").write_bytes(DATA + b"x")


def empty_control(path: Path) -> None:
    (path / "data").write_bytes(DATA[: 2 << 20])
    (path / "data.aria2").touch()


def torn_control(path: Path) -> None:
    (path / "data").write_bytes(DATA[: 2 << 20])
    (path / "data.aria2").write_bytes(bytes(100))


def control_that_claims_all(path: Path) -> None:
    from reconciler.fetch import aria2_protocol

    (path / "data").write_bytes(DATA[:1000])
    (path / "data.aria2").write_bytes(aria2_protocol.control_file([[(0, LARGE)]], LARGE, LARGE))


def notes_that_claim_all(path: Path) -> None:
    (path / "data").write_bytes(DATA[: 2 << 20])
    (path / "pieces").write_bytes(b"f" * 9999)


def notes_that_are_garbage(path: Path) -> None:
    (path / "data").write_bytes(DATA[: 2 << 20])
    (path / "pieces").write_bytes(b"\xff\x00zz")


def notes_that_are_a_pipe(path: Path) -> None:
    (path / "data").write_bytes(DATA[: 2 << 20])
    os.mkfifo(path / "pieces")


def a_symlink(path: Path) -> None:
    victim = path.parents[2] / "victim"
    victim.write_bytes(b"precious")
    (path / "data").symlink_to(victim)


def a_symlinked_control(path: Path) -> None:
    victim = path.parents[2] / "victim"
    victim.write_bytes(b"precious")
    (path / "data").write_bytes(DATA[: 2 << 20])
    (path / "data.aria2").symlink_to(victim)


def a_hard_link(path: Path) -> None:
    victim = path.parents[2] / "victim"
    victim.write_bytes(b"precious")
    os.link(victim, path / "data")


def a_folder(path: Path) -> None:
    (path / "data").mkdir()
    (path / "data" / "x").touch()


def a_pipe(path: Path) -> None:
    os.mkfifo(path / "data")


def several(path: Path) -> None:
    (path / "data").write_bytes(DATA[: 1 << 20])
    for name in ("b", "c"):
        (path.parent / name).mkdir()
        (path.parent / name / "data").write_bytes(DATA[: 3 << 20])
    (path.parent / "stray").write_bytes(b"x")


def foreign_files(path: Path) -> None:
    (path / "data").write_bytes(DATA[: 1 << 20])
    (path / "evil.so").write_bytes(b"x")


def a_linked_attempt(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").write_bytes(b"precious")
    path.rmdir()
    path.symlink_to(elsewhere)


def a_linked_blob_folder(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").write_bytes(b"precious")
    shutil.rmtree(path.parent)
    path.parent.symlink_to(elsewhere)


def a_file_for_a_folder(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"x")


def open_to_others(path: Path) -> None:
    (path / "data").write_bytes(DATA[: 1 << 20])
    path.chmod(0o777)
    path.parent.chmod(0o777)


def folders_deeper_than_any_stack(path: Path) -> None:
    """Recursion or full paths cannot delete it: the path is longer than PATH_MAX."""
    here = os.open(path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deeper", dir_fd=here)
        below = os.open("deeper", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


PLANTED = [
    folders_deeper_than_any_stack,
    too_long, empty_control, torn_control, control_that_claims_all, notes_that_claim_all, notes_that_are_garbage, notes_that_are_a_pipe,
    a_symlink, a_symlinked_control, a_hard_link, a_folder, a_pipe, several, foreign_files, a_linked_attempt, a_linked_blob_folder,
    a_file_for_a_folder, open_to_others,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED)
def test_whatever_lies_in_staging_the_blob_arrives_and_nothing_else_is_touched(
    root: Path, server: HostileServer, plant: Callable[[Path], None]
) -> None:
    plant(attempt(root))
    path = fetch(root, server)
    for name in ("victim", "elsewhere/data"):
        if (root.parent / name).exists():
            assert (root.parent / name).read_bytes() == b"precious"
    assert path.parent.parent == root / NAME.replace(":", "-")
    assert {it.name for it in path.parent.iterdir()} <= {"data", "pieces"}
    assert [it.name for it in path.parent.parent.iterdir()] == [path.parent.name]
    for folder in (path.parent, path.parent.parent, root):
        assert stat.S_IMODE(folder.lstat().st_mode) == 0o700


def test_what_has_a_second_name_elsewhere_is_not_written_to(root: Path, server: HostileServer) -> None:
    elsewhere = root.parent / "elsewhere"
    elsewhere.write_bytes(DATA[: 4 << 20])
    os.link(elsewhere, attempt(root) / "data")

    fetch(root, server)

    assert elsewhere.read_bytes() == DATA[: 4 << 20]


def test_a_file_that_is_too_long_is_not_gone_on_from(root: Path) -> None:
    too_long(attempt(root))

    assert Staging(root).resume(NAME, len(DATA)) is None


def test_staging_that_is_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("file", "link"):
        fetcher = Aria2Fetcher(tmp_path / name, FAST)
        outcome = collect(fetcher, [want(DATA, "http://127.0.0.1:1/x")])[NAME]
        fetcher.close()
        assert isinstance(outcome, FetchFailed)
        assert isinstance(outcome.error, StoreError)


def test_a_download_that_takes_many_runs_counts_as_new_with_each_of_them(root: Path) -> None:
    """The store deletes old folders by their age, which writing to the files in them does not change."""
    (attempt(root) / "data").write_bytes(DATA[: 1 << 20])
    folder = attempt(root).parent
    os.utime(folder, (1000, 1000))
    opened = Staging(root)
    opened.open()
    try:
        assert opened.resume(NAME, LARGE)
    finally:
        opened.close()
    assert time.time() - folder.stat().st_mtime < 3600


def test_what_was_adopted_leaves_no_folder(root: Path, server: HostileServer) -> None:
    fetcher = Aria2Fetcher(root, FAST)
    for outcome in fetcher.fetch([want(DATA, server.url("/x"))], EventRecorder()):
        good(outcome, DATA).path.rename(root / "adopted")
    fetcher.close()
    assert [path.name for path in files_under(root)] == ["adopted"]
    assert not list(root.glob("sha256-*"))


def test_a_file_system_without_holes_is_continued_from_nothing(root: Path, server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would report every byte as written."""
    monkeypatch.setattr(Staging, "_granularity", lambda _: 0)
    (attempt(root) / "data").write_bytes(DATA[: 3 << 20])
    fetch(root, server)
    assert server.sent("/x") >= LARGE


def test_holes_are_found_here(root: Path) -> None:
    opened = Staging(root)
    opened.open()
    try:
        assert 0 < opened._granularity() <= 65536
        path = root / "f"
        with path.open("wb") as file:
            os.pwrite(file.fileno(), b"x" * 100_000, 1 << 20)
        assert stagings._written_ranges(path) == [(1 << 20, (1 << 20) + 100_000)]
    finally:
        opened.close()


_DISK = """
import json, os, subprocess, sys
from pathlib import Path
from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.fetch.settings import FetchSettings
from reconciler.core.events import Incident
from reconciler.ports import Fetched, Want
mount, wants, direct = sys.argv[1], [Want(**{**it, "sources": tuple(it["sources"])}) for it in json.loads(sys.argv[2])], int(sys.argv[3])
incidents = []
def run():
    fetcher = Aria2Fetcher(Path(mount, "staging"), FetchSettings(direct_bytes=direct))
    found = {}
    for outcome in fetcher.fetch(wants, lambda event: incidents.append(event.kind) if isinstance(event, Incident) else None):
        found[outcome.digest] = "fetched" if isinstance(outcome, Fetched) else outcome.error.name
        if isinstance(outcome, Fetched):
            outcome.path.rename(Path(mount, outcome.digest))
    fetcher.close()
    return found
first = run()
left = [str(path) for path in Path(mount, "staging").rglob("*") if path.is_file() and path.name != ".fetch.lock"]
subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
print(json.dumps([first, left, incidents, run()]))
"""


@pytest.mark.parametrize("direct", [0, 1 << 30], ids=["aria2", "direct"])
def test_a_full_disk_fails_one_blob_and_leaves_nothing(tmp_path: Path, server: HostileServer, direct: int) -> None:
    """A file system of 8 MiB in a mount namespace of its own; when it has grown, the next run succeeds."""
    big, small = some(20 << 20, 3), some(SMALL, 4)
    wants = [want(small, server.on("/small", honest(small))), want(big, server.on("/big", honest(big)))]
    mount = tmp_path / "mount"
    mount.mkdir()
    arguments = [str(mount), json.dumps([msgspec.to_builtins(it) for it in wants]), str(direct)]
    script = f'mount -t tmpfs -o size=8m none {mount} && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", _DISK, *arguments]
    if subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no user namespace to mount in: unshare --user --map-root-user")
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    first, left, incidents, second = json.loads(ran.stdout)
    assert first == {name_of(small): "fetched", name_of(big): "disk-full"}
    assert left == []
    assert incidents == ["disk-full"]
    assert second == {name_of(small): "fetched", name_of(big): "fetched"}


def test_staging_does_not_grow_over_failing_runs(root: Path, server: HostileServer) -> None:
    server.on("/x", no_ranges(DATA[:-1] + bytes([DATA[-1] ^ 1])))
    for _ in range(3):
        fetcher = Aria2Fetcher(root, FAST)
        with contextlib.closing(fetcher):
            assert isinstance(collect(fetcher, [want(DATA, server.url("/x"))])[NAME], FetchFailed)
        assert sum(path.stat().st_size for path in files_under(root)) <= LARGE


# -- links that come between the look and the opening


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(b"ffff")
    return path


def test_two_downloaders_do_not_write_to_one_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stagings, "_LOCK_SECONDS", 0.0)
    first, second = Staging(root), Staging(root)
    first.open()

    with pytest.raises(StoreBusy):
        second.open()

    first.close()
    second.open()
    second.close()


def test_a_link_in_the_place_of_the_lock_is_not_followed(root: Path, victim: Path) -> None:
    (root / ".fetch.lock").symlink_to(victim)

    with pytest.raises(StoreError):
        Staging(root).open()


def test_a_link_in_the_place_of_the_notes_is_neither_read_nor_written(root: Path, victim: Path) -> None:
    made = Staging(root).start_attempt(NAME)
    (made.folder / "pieces").symlink_to(victim)

    Staging.record_pieces(made, "00")

    assert victim.read_bytes() == b"ffff"
    assert stagings._read_recorded(made.folder / "pieces") == ""


def test_a_link_in_the_place_of_the_data_is_not_measured(root: Path, victim: Path) -> None:
    (root / "data").symlink_to(victim)

    with pytest.raises(OSError, match="symbolic links"):
        stagings._written_ranges(root / "data")


def test_a_link_in_the_place_of_a_small_blob_is_not_written_through(root: Path, victim: Path) -> None:
    (root / "data").symlink_to(victim)

    with pytest.raises(FileExistsError):
        resolver.write_and_hash(root / "data", DATA[:4], "sha256")

    assert victim.read_bytes() == b"ffff"


def test_a_link_with_a_guessed_name_is_not_probed(root: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reconciler.fetch.staging.secrets.token_hex", lambda _: "guessed")
    (root / ".probe.guessed").symlink_to(victim)
    (attempt(root) / "data").write_bytes(DATA[: 1 << 20])

    with contextlib.suppress(StoreError):
        Staging(root).resume(NAME, len(DATA))

    assert victim.read_bytes() == b"ffff"
