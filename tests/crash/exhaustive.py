"""
The exhaustive form of the crash suite: every kill, every refusal, and a table of what was tried. ``make crash``.

    python -m tests.crash.exhaustive          each call refused with one error in turn, once and from then on
    python -m tests.crash.exhaustive --all    each call refused with every error: most of an hour
    python -m tests.crash.exhaustive power    the rows with that word alone
"""

from __future__ import annotations

import errno
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.crash import power_cut, syscalls
from tests.crash.scenario import (
    KILLED,
    UNTOUCHED,
    Scene,
    differences,
    effects_of_a_run,
    interrupted_again,
    interrupted_run,
    killed_at,
    untouched_end,
)
from tests.crash.test_fail_at_every_effect import ERRORS, faults_after
from tests.storenode import memory


class Bench:
    """Fresh folders, one at a time, and the end that every run must come to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self.end = untouched_end(self.fresh())
        self.effects = len(effects_of_a_run(self.fresh()))
        self.calls = len(effects_of_a_run(self.fresh(), opening=True))

    def fresh(self) -> Path:
        """Return a new folder; the one before it goes."""
        shutil.rmtree(self._folder / str(self._number), ignore_errors=True)
        self._number += 1
        return self._folder / str(self._number)

    def after(self, root: Path) -> list[str]:
        """Return what is wrong now, and after the next run."""
        scene = Scene(root)
        found = scene.faults()
        scene.run()
        return found + scene.faults() + differences(scene.end(), self.end)


def kills(bench: Bench) -> Iterator[list[str]]:
    """Kill before every effect, until a run passes untouched."""
    number, code = 0, KILLED
    while code != UNTOUCHED:
        number += 1
        root = bench.fresh()
        code = interrupted_run(root, killed_at(number))
        found = [] if code in {KILLED, UNTOUCHED} else [f"the child exited with {code}"]
        yield [f"killed at {number}: {text}" for text in found + bench.after(root)]


def kills_of_recoveries(bench: Bench) -> Iterator[list[str]]:
    """Kill a run, then kill the run that recovers."""
    for first in range(2, bench.effects, max(1, bench.effects // 25)):
        for second in range(1, 130, 16):
            root = bench.fresh()
            interrupted_run(root, killed_at(first))
            interrupted_again(root, killed_at(second))
            yield [f"killed at {first}, then at {second}: {text}" for text in bench.after(root)]


def refusals(bench: Bench, *, once: bool, every: bool) -> Iterator[list[str]]:
    """Refuse every call that touches the disk, with one error in turn or with every one."""
    for number in range(1, bench.calls):
        for code in ERRORS if every else (ERRORS[number % len(ERRORS)],):
            found = faults_after(bench.fresh(), number, code, bench.end, once=once)
            yield [f"call {number}, {errno.errorcode[code]}: {text}" for text in found]


def power_cuts(folder: Path) -> Iterator[list[str]]:
    """Cut the power before every effect, where this machine mounts a loop device."""
    if why := power_cut.missing(folder):
        print(why)
        return
    found = power_cut.outcome("points")
    yield found["violations"]
    yield from [[]] * (found["tried"] - 1)


def traces(what: str, step: int) -> Iterator[list[str]]:
    """Kill or stop the whole program at its system calls, where strace is."""
    if why := syscalls.missing():
        print(why)
        return
    yield from syscalls.outcome(what, step)


def main() -> None:
    """Try everything and print the table; exit 1 if anything did not hold."""
    every = "--all" in sys.argv
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        bench = Bench(Path(folder))
        suites = {
            "killed before the n-th effect": kills(bench),
            "killed again in the recovery": kills_of_recoveries(bench),
            "power cut before the n-th effect": power_cuts(Path(folder)),
            "killed at the n-th system call": traces("kills", 1),
            "stopped at the n-th system call": traces("stops", 3),
            "n-th call refused, once": refusals(bench, once=True, every=every),
            "n-th call refused, from then on": refusals(bench, once=False, every=every),
        }
        print(f"| {'fault':<33} | points tried | violations | seconds |\n|{'-' * 35}|-------------:|-----------:|--------:|")
        violations = []
        words = [word for word in sys.argv[1:] if word != "--all"]
        for name, suite in suites.items():
            if words and not any(word in name for word in words):
                continue
            began, results = time.monotonic(), list(suite)
            wrong = [text for found in results for text in found]
            violations += wrong
            print(f"| {name:<33} | {len(results):>12,} | {len(wrong):>10} | {time.monotonic() - began:>7.0f} |", flush=True)
    print("\n".join(violations))
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
