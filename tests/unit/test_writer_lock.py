"""One writer at a time, whoever starts how many, and however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reconciler.core.errors import StoreBusy, StoreError
from reconciler.store import writer_lock

#: Takes the lock, says so, and holds it until its standard input ends.
HOLD = """
import sys
from pathlib import Path
from reconciler.core.errors import StoreBusy
from reconciler.store import writer_lock
sys.stdin.readline()
try:
    with writer_lock.hold(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except StoreBusy as refused:
    print("busy", refused.message, flush=True)
"""


def starter(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline()


def end(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    child.wait(30)
    child.stdout.close()


def test_of_twenty_starters_exactly_one_holds(tmp_path: Path) -> None:
    children = [starter(tmp_path / ".lock") for _ in range(20)]
    try:
        for child in children:
            go(child)
        answers = [said(child).split()[0] for child in children]
    finally:
        for child in children:
            end(child)

    assert sorted(answers) == ["busy"] * 19 + ["held"]


def test_a_killed_holder_lets_go_and_the_busy_one_is_told_who_holds(tmp_path: Path) -> None:
    first, second, third = (starter(tmp_path / ".lock") for _ in range(3))
    try:
        go(first)
        assert said(first) == "held\n"
        go(second)
        assert said(second) == f"busy another run holds the store: process {first.pid}\n"
        os.kill(first.pid, signal.SIGKILL)
        first.wait(30)
        go(third)
        assert said(third) == "held\n"
    finally:
        for child in (first, second, third):
            end(child)


def test_who_waits_gets_it_when_the_holder_ends(tmp_path: Path) -> None:
    holder = starter(tmp_path / ".lock")
    try:
        go(holder)
        assert said(holder) == "held\n"
        assert holder.stdin is not None
        holder.stdin.close()
        with writer_lock.hold(tmp_path / ".lock", timeout_seconds=30.0):
            pass
    finally:
        holder.wait(30)
        assert holder.stdout is not None
        holder.stdout.close()


def test_the_file_stays_and_is_taken_again(tmp_path: Path) -> None:
    for _ in range(3):
        with writer_lock.hold(tmp_path / ".lock"), pytest.raises(StoreBusy), writer_lock.hold(tmp_path / ".lock"):
            pass

    assert (tmp_path / ".lock").exists()


def test_what_fails_inside_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writer_lock.hold(tmp_path / ".lock"):
        _ = 1 / 0
    with writer_lock.hold(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("what", ["link", "folder", "missing folder"])
def test_a_strange_lock_file_is_refused_clearly(tmp_path: Path, what: str) -> None:
    path = tmp_path / ".lock"
    if what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "folder":
        path.mkdir()
    else:
        path = tmp_path / "missing" / ".lock"

    with pytest.raises(StoreError), writer_lock.hold(path):
        pass

    assert not (tmp_path / "elsewhere").exists()


def test_who_holds_is_told_of_the_file_itself_and_no_strange_file_holds_up_the_answer(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "fifo")

    assert writer_lock.holder(path) == ""
    with writer_lock.hold(path):
        assert writer_lock.holder(path) == f"process {os.getpid()}"
        assert writer_lock.holder(tmp_path / "link") == ""
    assert [writer_lock.holder(path), writer_lock.holder(tmp_path / "fifo")] == ["", ""]
