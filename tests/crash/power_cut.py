"""
Cut the power: what a reported success promised is on the disk, and what was under way is finished by the next run.

    python -m tests.crash.power_cut points [STEP]     cut before every STEP-th effect, then run again
    python -m tests.crash.power_cut kept [WITHOUT]    cut after a reported success; without: "fsync" or "ledger"

A real ext4 on a loop device is shut down under the run without writing its journal back (EXT4_IOC_SHUTDOWN), then mounted again: what
was not synced is gone, as after a power cut. Prints one JSON document. Needs root.

All of it happens in a mount namespace of its own, for two reasons. The mounts and the loop devices in it go when its last process
does, however it ends. And nobody else's new namespace takes a copy of the mount along: such a copy, as any sandbox that starts
meanwhile makes one, keeps the dead file system alive, and the next mount of the same device would be that one, where every read
fails with EIO.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from reconciler.store import ledger_database
from tests.crash.scenario import KILLED, UNTOUCHED, Scene, child, differences, effects_of_a_run, interrupted_run, untouched_end
from tests.storenode import memory

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, linux/ext4.h
_NO_LOG_FLUSH = struct.pack("I", 2)
_MODULE = "tests.crash.power_cut"
#: In a namespace of its own, and gone with whoever started it.
ALONE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private")


class Disk:
    """An ext4 of its own, in a file."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "disk.img"
        self.place = folder / "disk"
        self.place.mkdir()
        self._number = 0
        with self.image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", self.image], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.place], check=True)

    def unmount(self) -> None:
        """Take it away, and wait until the kernel has let go of it: a mount before that would be the old one."""
        subprocess.run(["umount", self.place], check=True)
        deadline = time.monotonic() + 20
        while held := loops(self.image):
            assert time.monotonic() < deadline, f"still held: {held}"
            time.sleep(0.01)

    def cut(self) -> None:
        """Cut the power: nothing more reaches the disk, and what the journal holds is not written back."""
        fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.ioctl(fd, _SHUTDOWN, _NO_LOG_FLUSH)
        os.close(fd)

    def again(self) -> None:
        """Come back after the cut."""
        self.unmount()
        self.mount()

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


def loops(image: Path) -> str:
    """Return the loop devices over *image*, as ``losetup`` lists them."""
    return subprocess.run(["losetup", "--associated", image], check=True, capture_output=True, text=True).stdout


def faults(scene: Scene) -> list[str]:
    """Return what is wrong; the tester twin's own log is not synced and goes with the power."""
    return [text for text in scene.faults() if "never tested" not in text]


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
    found += faults(scene) + differences(scene.end(), expected)
    return [f"cut before effect {number}: {text}" for text in found]


def points(disk: Disk, step: int) -> dict[str, Any]:
    """Cut before every *step*-th effect; return how many cuts there were, and what did not hold."""
    expected = untouched_end(disk.fresh())
    numbers = range(1, len(effects_of_a_run(disk.fresh())) + 2, step)
    return {"tried": len(numbers), "violations": [text for number in numbers for text in faults_after_a_cut(disk, number, expected)]}


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
    return whole and found == untouched_end(disk.fresh())


def _careless(path: Path) -> sqlite3.Connection:
    connection = _open_writable(path)
    connection.execute("PRAGMA synchronous = OFF")
    return connection


_open_writable = ledger_database.open_writable
WITHOUT: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "": contextlib.nullcontext,
    "fsync": lambda: mock.patch.object(os, "fsync", return_value=None),
    "ledger": lambda: mock.patch.object(ledger_database, "open_writable", _careless),
}


def missing(folder: Path) -> str:
    """Return what this machine does not let us do in *folder*, or nothing."""
    if os.geteuid() != 0:
        return "a loop mount needs root: the power is not cut here"
    script = 'truncate -s 8M "$1/i" && mkfs.ext4 -q -F "$1/i" && mkdir -p "$1/m" && mount -o loop "$1/i" "$1/m" && umount "$1/m"'
    tried = subprocess.run([*ALONE, "sh", "-c", script, "sh", folder], capture_output=True, text=True)
    return f"no loop device can be mounted here, the power is not cut: {tried.stderr.strip()[:200]}" if tried.returncode else ""


def command(*what: str, folder: Path) -> list[str]:
    """Return the command that does *what* in a mount namespace of its own, its disk in *folder*."""
    return [*ALONE, sys.executable, "-m", _MODULE, "--in", str(folder), *what]


def outcome(*what: str) -> Any:
    """Return what the command *what* prints."""
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        ran = subprocess.run(command(*what, folder=Path(folder)), stdout=subprocess.PIPE, check=True, timeout=3600)
    return json.loads(ran.stdout)


def main(words: list[str]) -> None:
    """Do what the command line says; outside of a namespace, in one."""
    if words[0] != "--in":
        print(json.dumps(outcome(*words)))
        return
    disk = Disk(Path(words[1]))
    try:
        what, option = words[2], words[3] if words[3:] else ""
        with WITHOUT[option if what == "kept" else ""]():
            print(json.dumps(kept(disk) if what == "kept" else points(disk, int(option or "1"))))
    finally:
        disk.unmount()


if __name__ == "__main__":
    main(sys.argv[1:])
