"""Which modules a command imports, found by running it as a process of its own (``python -X importtime``)."""

from __future__ import annotations

import os
import subprocess
import sys


def modules(*words: str) -> frozenset[str]:
    """Return the names of the modules that ``reconcile`` with *words* imports; what it prints is not kept."""
    argv = [sys.executable, "-X", "importtime", "-m", "reconciler", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if line.startswith("import time:")]
    return frozenset(parts[2].strip() for parts in lines[1:] if len(parts) == 3)


def own(found: frozenset[str]) -> frozenset[str]:
    """Return those of *found* that are this program's."""
    return frozenset(name for name in found if name.partition(".")[0] == "reconciler")
