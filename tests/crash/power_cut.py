"""
Cut the power: what a reported success promised is on the disk, and what was under way is finished by the next run.

A real ext4 on a loop device is shut down under the run without writing its journal back (EXT4_IOC_SHUTDOWN), then mounted again: what
was not synced is gone, as after a power cut. The last test takes the syncs away and sees the promise broken, so that the others can be
believed. (Which sync is for what is in the order that the unit tests of ``durable`` write down: one later fsync of ext4 covers for all
before it, so that a single one that is missing shows there and not here.)
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.scenario import KILLED, UNTOUCHED, Scene, child, effects_of_a_run, interrupted_run

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, linux/ext4.h
_NO_LOG_FLUSH = struct.pack("I", 2)
#: ``make crash`` cuts before every effect.
STEP = 23


class Disk:
    """An ext4 of its own, in a file."""

    def __init__(self, folder: Path) -> None:
        self._image = folder / "disk.img"
        self.place = folder / "disk"
        self.place.mkdir()
        self._number = 0
        with self._image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", self._image], check=True)

    def mount(self) -> bool:
        """Mount it; say whether this machine lets us."""
        return subprocess.run(["mount", "-o", "loop", self._image, self.place], capture_output=True).returncode == 0

    def unmount(self) -> None:
        """Take it away."""
        subprocess.run(["umount", self.place], check=True, capture_output=True)

    def cut(self) -> None:
        """Cut the power: nothing more reaches the disk, and what the journal holds is not written back."""
        fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.ioctl(fd, _SHUTDOWN, _NO_LOG_FLUSH)
        os.close(fd)

    def again(self) -> None:
        """Come back after the cut."""
        self.unmount()
        assert self.mount()

    def fresh(self) -> Path:
        """Return a new folder on it; the one before goes."""
        subprocess.run(["rm", "-rf", self.place / str(self._number)], check=True)
        self._number += 1
        return self.place / str(self._number)

    def cut_at(self, number: int) -> Callable[[int, str], None]:
        """Return what cuts the power before the *number*-th effect."""

        def at(count: int, _name: str) -> None:
            if count == number:
                self.cut()
                os._exit(KILLED)

        return at


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("a loop mount needs root: the power is not cut here")
    made = Disk(tmp_path)
    if not made.mount():
        pytest.skip("this machine mounts no loop device: the power is not cut here")
    try:
        yield made
    finally:
        made.unmount()


def faults(scene: Scene) -> list[str]:
    """Return what is wrong; the tester twin's own log is not synced and goes with the power."""
    return [text for text in scene.faults() if "never tested" not in text]


def ended(disk: Disk) -> dict[str, object]:
    scene = Scene(disk.fresh())
    scene.prepare()
    scene.run()
    return scene.end()


def faults_after_a_cut(disk: Disk, number: int, expected: dict[str, object]) -> list[str]:
    """Return what is wrong after a cut before the *number*-th effect, and after the next run."""
    root = disk.fresh()
    code = interrupted_run(root, disk.cut_at(number))
    if code == UNTOUCHED:
        disk.cut()
    disk.again()
    scene = Scene(root)
    found = [] if code in {KILLED, UNTOUCHED} else [f"the child exited with {code}"]
    found += faults(scene)
    scene.run()
    end = scene.end()
    found += faults(scene) + [f"{key} is {end[key]}, expected {expected[key]}" for key in expected if end[key] != expected[key]]
    return [f"cut before effect {number}: {text}" for text in found]


def test_the_next_run_finishes_what_a_power_cut_left(disk: Disk) -> None:
    expected = ended(disk)
    effects = len(effects_of_a_run(disk.fresh()))

    violations = [text for number in range(1, effects + 2, STEP) for text in faults_after_a_cut(disk, number, expected)]

    assert not violations, "\n".join(violations)


def kept(disk: Disk) -> bool:
    """Run to a reported success, cut the power, and say whether all of it is there."""
    root = disk.fresh()

    def work() -> None:
        scene = Scene(root)
        scene.prepare()
        scene.run()
        disk.cut()

    assert child(work) == UNTOUCHED
    disk.again()
    scene = Scene(root)
    try:
        whole, found = not faults(scene), scene.end()
    except Exception:
        return False  # what is there cannot even be read
    return whole and found == ended(disk)


def test_a_reported_success_survives_a_power_cut(disk: Disk) -> None:
    assert kept(disk)


def test_without_any_sync_a_reported_success_is_lost(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    assert not kept(disk)
