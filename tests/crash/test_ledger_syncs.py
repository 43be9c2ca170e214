"""The ledger's promise, seen from the kernel: a statement that returned is on the disk, and its journal is gone for good."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.syscalls import missing

WRITE = """
import os, sys
from pathlib import Path
from reconciler.store.ledger import Ledger
with Ledger.writing(Path(sys.argv[1])) as ledger:
    os.write(1, b"begin")
    ledger.set_fact("key", 1)
    os.write(1, b"end")
"""
CALLS = {"write": "write", "pwrite64": "write", "fsync": "sync", "fdatasync": "sync", "unlink": "remove", "unlinkat": "remove"}


def test_a_statement_is_on_the_disk_when_it_returns(tmp_path: Path) -> None:
    """
    What ``synchronous = EXTRA`` and ``journal_mode = DELETE`` stand for.

    The old page is safe before the new one is written; the new one before the journal goes; and without the last sync a power cut
    could bring the journal back, and with it the old page.
    """
    if why := missing():
        pytest.skip(why)
    path, trace = tmp_path / "ledger.db", tmp_path / "trace"

    traced: list[str | Path] = ["strace", "-y", "-e", f"trace={','.join(f'?{name}' for name in CALLS)}", "-o", trace]
    subprocess.run([*traced, sys.executable, "-c", WRITE, path], check=True, timeout=60, stdout=subprocess.DEVNULL)

    names = {f"{path}-journal": "journal", str(path): "ledger", str(tmp_path): "folder"}
    text = trace.read_text()
    lines = text[text.index('"begin"') : text.index('"end"')].splitlines()[1:-1]
    steps = [f"{CALLS[line.partition('(')[0]]} {next(names[name] for name in names if name in line)}" for line in lines]
    kinds = [kind for kind, _ in itertools.groupby(steps)]
    order = iter(kinds)
    safely = ["write journal", "sync journal", "sync folder", "write ledger", "sync ledger", "remove journal", "sync folder"]
    assert all(step in order for step in safely), kinds
    assert next(order, None) is None
    assert kinds.count("write ledger") == 1
