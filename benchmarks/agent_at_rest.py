"""
The agent over a long time: what it takes at rest, and whether anything grows in hundreds of cycles that each change something.

    python -m benchmarks.agent_at_rest                           # 500 cycles, then an hour at rest
    python -m benchmarks.agent_at_rest --cycles 500 --rest 600   # ten minutes at rest

A node of twenty small models; in each cycle a new snapshot disables or enables one, so that each swaps the active set. The agent waits an
hour between cycles and is woken by SIGHUP, as a reload of its settings does. Measured from outside (``/proc``): resident memory, open
descriptors, threads, processor seconds, and wake-ups (voluntary context switches). Bars: 60 MiB resident, 0.05 % of a core at rest, no
growth: what the last fifth of the cycles holds is at most a twentieth more than the second fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
from msgspec import Struct

from benchmarks import stores
from benchmarks.listening import until
from tests.network import Network

MODELS = 20
MOST_MIB = 60.0
MOST_OF_A_CORE = 0.0005
MOST_GROWTH = 1.05
#: A cycle takes a tenth of a second here; on a machine with much other work, more.
_CYCLE_SECONDS = 60.0


class Seen(Struct, frozen=True, kw_only=True):
    """What the agent's process held at one moment; processor seconds and wake-ups count from its start."""

    mib: float
    descriptors: int
    threads: int
    processor_seconds: float
    wakeups: int


def look(process: psutil.Process) -> Seen:
    with process.oneshot():
        spent, switches = process.cpu_times(), process.num_ctx_switches()
        return Seen(
            mib=process.memory_info().rss / (1 << 20),
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            processor_seconds=spent.user + spent.system + spent.children_user + spent.children_system,
            wakeups=switches.voluntary,
        )


class Node:
    """A node in *folder* and its agent, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signed = Network()
        stores.full(folder, MODELS, self.signed)
        self._models = [stores.model(self.signed, number) for number in range(MODELS)]
        self._log = (folder / "agent.log").open("wb")
        words = [sys.executable, "-m", "reconciler", "agent", "--interval", "1h", "--config", str(folder / "reconcile.toml")]
        self.child = subprocess.Popen(words, stdout=self._log, stderr=subprocess.STDOUT)
        self.process = psutil.Process(self.child.pid)

    def change(self, number: int) -> None:
        """Publish another snapshot, wake the agent, and wait until it waits again with the new set."""
        changed = [dict(model) for model in self._models]
        if number % 2 == 0:
            changed[number % MODELS]["state"] = "disabled"
        self.signed.now = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
        (self.folder / "published.json").write_bytes(self.signed.snapshot(*changed))
        self.child.send_signal(signal.SIGHUP)
        self.wait(f"version = {self.signed.version}\n")

    def wait(self, line: str = "") -> None:
        """Wait until the agent waits, with *line* in its lock."""

        def waits() -> bool:
            assert self.child.poll() is None, (self.folder / "agent.log").read_text()[-2000:]
            return line in (self.folder / "models.lock").read_text() and self._phase() == "waiting"

        until(waits, lambda: "the cycle does not end", _CYCLE_SECONDS)

    def rest(self, seconds: float) -> None:
        """Let the agent rest for so long; it may not end meanwhile."""
        end = os.pidfd_open(self.child.pid)
        try:
            assert not select.select([end], [], [], seconds)[0], (self.folder / "agent.log").read_text()[-2000:]
        finally:
            os.close(end)

    def _phase(self) -> str:
        try:
            return str(json.loads((self.folder / "store/health.json").read_bytes())["phase"])
        except (OSError, ValueError, KeyError):
            return ""

    def close(self) -> None:
        self.child.terminate()
        try:
            self.child.wait(timeout=30)
        finally:
            self.child.kill()
            self.child.wait()
            self._log.close()


def cycles(node: Node, count: int) -> list[Seen]:
    """Return what the agent held after each of *count* cycles."""
    found = []
    for number in range(count):
        node.change(number)
        found.append(look(node.process))
        if number % 50 == 49:
            print(f"  {number + 1} cycles: {found[-1].mib:.1f} MiB, {found[-1].descriptors} descriptors", file=sys.stderr, flush=True)
    return found


def growth(found: list[float]) -> float:
    """Return the median of the last fifth, of that of the second fifth."""
    fifth = len(found) // 5
    return statistics.median(found[-fifth:]) / statistics.median(found[fifth : 2 * fifth])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--rest", type=float, default=3600.0, help="seconds")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        node = Node(Path(folder) / "node")
        try:
            node.wait()
            began = time.monotonic()
            seen = cycles(node, given.cycles)
            seconds = time.monotonic() - began
            before = look(node.process)
            node.rest(given.rest)
            after = look(node.process)
        finally:
            node.close()
    spent = seen[-1].processor_seconds - seen[0].processor_seconds
    of_a_core = (after.processor_seconds - before.processor_seconds) / given.rest
    result = {
        "cycles": given.cycles,
        "seconds_a_cycle": seconds / given.cycles,
        "processor_seconds_a_cycle": spent / (given.cycles - 1),
        "most_mib": max(one.mib for one in seen),
        "memory_growth": growth([one.mib for one in seen]),
        "descriptor_growth": growth([float(one.descriptors) for one in seen]),
        "most_descriptors": max(one.descriptors for one in seen),
        "threads": [seen[0].threads, seen[-1].threads],
        "rest_seconds": given.rest,
        "rest_mib": after.mib,
        "rest_of_a_core": of_a_core,
        "rest_wakeups": after.wakeups - before.wakeups,
    }
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    wrong = {
        f"more than {MOST_MIB:g} MiB resident": float(str(result["most_mib"])) > MOST_MIB,
        f"more than {MOST_OF_A_CORE:.2%} of a core at rest": of_a_core > MOST_OF_A_CORE,
        "memory grows": growth([one.mib for one in seen]) > MOST_GROWTH,
        "descriptors grow": growth([float(one.descriptors) for one in seen]) > MOST_GROWTH,
    }
    sys.exit("; ".join(what for what, is_so in wrong.items() if is_so))


if __name__ == "__main__":
    main()
