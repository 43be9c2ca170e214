"""
A reader that opens ``active/names/tiny/…`` in a loop, through two hundred updates of which some fail and some are killed, never misses.

The reader is a process of its own, as a router or a model server is. Each update lists the next version, which replaces the one before.
"""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from reconciler.core.lock import Lock
from tests.crash.scenario import KILLED, Effects, child, killed_at
from tests.storenode import StoreNode, memory
from tests.twins.content import changed
from tests.twins.node import POLICY

UPDATES = 200
_READER = """
import pathlib, sys, time
path, stop = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
reads = misses = 0
seen = set()
while not stop.exists():
    for _ in range(50):
        reads += 1
        try:
            data = path.read_bytes()
        except OSError as error:
            misses += 1
            print("miss", error, flush=True)
            continue
        seen.add(data)
    time.sleep(0.001)
print(reads, misses, len(seen), all(one.startswith(b"version ") and one.endswith(b" end") for one in seen), flush=True)
"""


def version(number: int) -> dict[str, bytes]:
    return {"tiny.gguf": b"version %d " % number + b"x" * 5000 + b" end"}


def listing(node: StoreNode, serving: int, newest: int) -> Lock:
    """Return the list in which each version from *serving* on replaces the one before; nodes are given all that they may still serve."""
    return node.lock(
        *(
            node.item(
                f"tiny:v{number}", version(number), state="enabled" if number == newest else "retired", replaces=[f"tiny:v{number - 1}"]
            )
            for number in range(serving, newest + 1)
        )
    )


def test_a_reader_of_a_stable_name_never_misses() -> None:
    chance = random.Random(7)
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        root, stop = Path(folder, "node"), Path(folder, "stop")
        root.mkdir()
        node = StoreNode(root)
        node.policy = changed(POLICY, grace_seconds=86400.0)
        node.run(listing(node, 1, 1))
        served = failed = killed = 0
        reader = subprocess.Popen(
            [sys.executable, "-c", _READER, str(node.layout.active / "names/tiny/tiny.gguf"), str(stop)], stdout=subprocess.PIPE, text=True
        )
        try:
            for newest in range(2, UPDATES + 2):
                serving = min(int(model.partition(":v")[2]) for model in node.active())
                lock = listing(node, serving, newest)
                if newest % 5 == 0:
                    node.tester.verdicts = {f"tiny:v{newest}": ("bad", "it says nothing")}
                if newest % 3 == 0:
                    killed += child(functools.partial(_run, node, lock, killed_at(chance.randrange(1, 120)))) == KILLED
                else:
                    node.run(lock)
                node.tester.verdicts = {}
                served += f"tiny:v{newest}" in node.active()
                failed += newest % 5 == 0
        finally:
            stop.touch()
            said = reader.communicate(timeout=60)[0].split("\n")
        reads, misses, versions, whole = said[-2].split()
        assert (misses, whole) == ("0", "True"), said
        assert int(reads) > UPDATES
        assert int(versions) > UPDATES // 3
        assert served > UPDATES // 2
        assert failed == UPDATES // 5
        assert killed > UPDATES // 10


def _run(node: StoreNode, lock: Lock, at: Callable[[int, str], None]) -> None:
    with Effects(at, root=node.root):
        node.run(lock)
