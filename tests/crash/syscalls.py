"""
Kill a whole ``reconcile apply`` at its n-th system call that changes something, by strace: no part of it is of our making.

    python -m tests.crash.syscalls [STEP]

In two forms: the program's main thread dies at each of its calls in turn; and of the program with all its threads and children,
whoever is the first to call some one function for the n-th time.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from signal import Signals

from reconciler.demo.server import serving
from tests.crash.whole import Life, adopting
from tests.storenode import memory

_NAMES = (
    "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir",
    "chmod", "fchmod", "fchmodat", "truncate", "ftruncate",
)  # fmt: skip
_WRITES = ("write", "pwrite64")
STOPS = (Signals.SIGTERM, Signals.SIGINT, Signals.SIGHUP, Signals.SIGPIPE)


def missing() -> str:
    """Return why nothing can be traced here, or nothing."""
    if not shutil.which("strace"):
        return "strace is not installed: apt-get install strace"
    tried = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return f"strace may trace nothing here: {tried.stderr.strip()[:200]}" if tried.returncode else ""


def _known(names: tuple[str, ...]) -> str:
    return ",".join(f"?{name}" for name in names)  # not every machine has every call


class Traced:
    """A life whose updates are traced."""

    def __init__(self, life: Life) -> None:
        self.life = life

    def calls(self) -> tuple[int, dict[str, int]]:
        """Return how many changing calls the main thread makes, and for each call but writes how many the busiest thread makes."""
        with tempfile.NamedTemporaryFile("r") as trace:
            self.life.fresh()
            self._run("-f", "--seccomp-bpf", "-o", trace.name, "-e", f"trace={_known(_NAMES + _WRITES)}", check=True)
            found = [match.groups() for match in re.finditer(r"(?m)^(\d+) +(\w+)\(", trace.read())]
        per_thread = Counter(found)
        busiest = {name: max(count for (_, other), count in per_thread.items() if other == name) for _, name in found}
        main = sum(thread == found[0][0] for thread, _ in found)
        return main, {name: count for name, count in busiest.items() if name not in _WRITES}

    def _run(self, *options: str, check: bool = False) -> int:
        ran = subprocess.run(["strace", "-qq", *options, *self.life.command], capture_output=True, check=check, timeout=300)
        return ran.returncode

    def killed(self, number: int, *names: str, follow: bool = False) -> list[str]:
        """Kill at the *number*-th call of *names*, of all that change something; return what is wrong then, and after the next run."""
        self.life.fresh()
        chosen = _known(names or _NAMES + _WRITES)
        with adopting() as outliving:
            self._run(*["-f"] * follow, "-o", "/dev/null", "-e", f"trace={chosen}", f"--inject={chosen}:signal=KILL:when={number}")
            left = outliving()
        return [f"killed at call {number} of {' '.join(names) or 'any'}: {text}" for text in left + self.life.after()]

    def signalled(self, signal: Signals, number: int) -> list[str]:
        """Send *signal* at the main thread's *number*-th changing call; return what is wrong then, and after the next run."""
        self.life.fresh()
        chosen = _known(_NAMES + _WRITES)
        with adopting() as outliving:
            code = self._run("-o", "/dev/null", "-e", f"trace={chosen}", f"--inject={chosen}:signal={signal.name}:when={number}")
            left = outliving()
        expected = 0 if signal == Signals.SIGPIPE else 128 + signal
        found = [] if code == expected else [f"exit code {code}, expected {expected}"]
        return [f"{signal.name} at call {number}: {text}" for text in found + left + self.life.after()]

    def stopped_everywhere(self, step: int) -> Iterator[list[str]]:
        """Send one of the signals in turn at every *step*-th changing call of the main thread."""
        for turn, number in enumerate(range(1, self.calls()[0] + 1, step)):
            yield self.signalled(STOPS[turn % len(STOPS)], number)

    def everywhere(self, step: int) -> Iterator[list[str]]:
        """Kill at every *step*-th point of either form."""
        main, others = self.calls()
        for number in range(1, main + 1, step):
            yield self.killed(number)
        points = [(name, number) for name, count in sorted(others.items()) for number in range(1, count + 1)]
        for name, number in points[::step]:
            yield self.killed(number, name, follow=True)


@contextlib.contextmanager
def traced() -> Iterator[Traced]:
    """Give a node in memory, and a server beside it."""
    with tempfile.TemporaryDirectory(dir=memory()) as folder, serving() as server:
        yield Traced(Life(Path(folder, "node"), server))


def main() -> None:
    """Print how many points were tried, and what did not hold."""
    with traced() as life:
        results = list(life.everywhere(int((sys.argv[1:] or ["1"])[0])))
    wrong = [text for found in results for text in found]
    print(len(results), "points", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
