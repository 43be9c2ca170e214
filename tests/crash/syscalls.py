"""
Kill a whole ``reconcile apply`` at its n-th system call that changes something, by strace: no part of it is of our making.

    python -m tests.crash.syscalls kills|stops STEP FIRST     every STEP-th point, from FIRST

In two forms: the program's main thread dies, or is told to stop, at each of its calls in turn; and of the program's other threads and
its children, whoever is the first to call some one function for the n-th time dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from signal import SIG_DFL, Signals, default_int_handler, signal

from msgspec import Struct

from reconciler.demo.server import serving
from tests.crash.whole import Life, adopting
from tests.storenode import memory

_NAMES = (
    "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir",
    "chmod", "fchmod", "fchmodat", "truncate", "ftruncate", "write", "pwrite64",
)  # fmt: skip
STOPS = (Signals.SIGTERM, Signals.SIGINT, Signals.SIGHUP, Signals.SIGPIPE)


def missing() -> str:
    """Return why nothing can be traced here, or nothing."""
    if not shutil.which("strace"):
        return "strace is not installed: apt-get install strace"
    tried = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return f"strace may trace nothing here: {tried.stderr.strip()[:200]}" if tried.returncode else ""


def _known(names: tuple[str, ...]) -> str:
    return ",".join(f"?{name}" for name in names)  # not every machine has every call


class Point(Struct, frozen=True):
    """Somebody's *number*-th call of *name*: the main thread's, or with *follow* whoever of all threads and children is the first."""

    name: str
    number: int
    follow: bool = False


class NotReached(Exception):
    """The run ended before the call: a thread got further here than it did when the calls were counted. Nothing was tried."""


class Traced:
    """A life whose updates are traced."""

    def __init__(self, life: Life) -> None:
        self.life = life

    def points(self) -> tuple[list[Point], list[Point]]:
        """Return the changing calls of the main thread in their order, and those that the others make more often than it."""
        with tempfile.NamedTemporaryFile("r") as trace:
            self.life.fresh()
            self._run("-f", "--seccomp-bpf", "-o", trace.name, "-e", f"trace={_known(_NAMES)}", check=True)
            found = re.findall(r"(?m)^(\d+) +(\w+)\(", trace.read())
        seen = Counter[tuple[str, str]]()
        points = dict[Point, None]()
        for thread, name in found:
            seen[thread, name] += 1  # strace counts for each thread, and each call apart
            points[Point(name, seen[thread, name], thread != found[0][0])] = None
        main = [point for point in points if not point.follow]
        return main, [point for point in points if point.follow and point.name != "write" and Point(point.name, point.number) not in main]

    def _run(self, *options: str, check: bool = False) -> int:
        ran = subprocess.run(["strace", "-qq", *options, *self.life.command], capture_output=True, check=check, timeout=300)
        return ran.returncode

    def killed(self, point: Point) -> list[str]:
        """Kill whoever is at *point*; return what is wrong then, and after the next run."""
        return self._at(point, "KILL", 128 + Signals.SIGKILL)

    def signalled(self, number: Signals, point: Point) -> list[str]:
        """Send signal *number* to the main thread at *point*; return what is wrong then, and after the next run."""
        return self._at(point, number.name, 0 if number == Signals.SIGPIPE else 128 + number)

    def _at(self, point: Point, sent: str, expected: int) -> list[str]:
        self.life.fresh()
        with adopting() as outliving, tempfile.NamedTemporaryFile("r") as trace:
            code = self._run(
                *["-f"] * point.follow, "-o", trace.name, "-e", f"trace={point.name}",
                f"--inject={point.name}:signal={sent}:when={point.number}",
            )  # fmt: skip
            left, is_sent = outliving(), f"--- {sent} " in trace.read()
        if code == 0 and not is_sent:
            raise NotReached
        if not point.follow and code not in {expected, 128 - expected}:  # strace ends as whom it traced
            left.append(f"exit code {code}, expected {expected}")
        return [f"{sent} at {point.name} {point.number}: {text}" for text in left + self.life.after()]

    def kills(self, step: int, first: int) -> Iterator[list[str]]:
        """Kill at every *step*-th point, from *first*."""
        main, others = self.points()
        for point in (main + others)[first::step]:
            with contextlib.suppress(NotReached):
                yield self.killed(point)

    def stops(self, step: int, first: int) -> Iterator[list[str]]:
        """Send one of the signals in turn at every *step*-th changing call of the main thread."""
        main, _ = self.points()
        for turn, point in enumerate(main[first::step]):
            with contextlib.suppress(NotReached):
                yield self.signalled(STOPS[turn % len(STOPS)], point)


@contextlib.contextmanager
def traced() -> Iterator[Traced]:
    """Give a node in memory, and a server beside it."""
    with tempfile.TemporaryDirectory(dir=memory()) as folder, serving() as server:
        yield Traced(Life(Path(folder, "node"), server))


def outcome(what: str, step: int) -> list[list[str]]:
    """Return what was wrong at each *step*-th point, as many processes at it as there are processors."""
    count = os.cpu_count() or 1
    command = [sys.executable, "-m", "tests.crash.syscalls", what]
    running = [subprocess.Popen([*command, str(step * count), str(step * turn)], stdout=subprocess.PIPE) for turn in range(count)]
    results = [json.loads(one.communicate()[0]) for one in running]
    return [found for result in results for found in result]


def main() -> None:
    """Print what was wrong at each point."""
    signal(Signals.SIGINT, default_int_handler)  # a shell's background job ignores it, and so would what we start;
    signal(Signals.SIGHUP, SIG_DFL)  # under nohup, this one
    what, step, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with traced() as life:
        print(json.dumps(list(life.kills(step, first) if what == "kills" else life.stops(step, first))))


if __name__ == "__main__":
    main()
