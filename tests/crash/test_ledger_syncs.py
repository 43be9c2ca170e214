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
os.write(1, b"open")
with Ledger.writing(Path(sys.argv[1])) as ledger:
    os.write(1, b"begin")
    ledger.set_fact("key", 1)
    os.write(1, b"end")
"""
CALLS = {"write": "write", "pwrite64": "write", "fsync": "sync", "fdatasync": "sync", "unlink": "remove", "unlinkat": "remove"}
SAFELY = ["write journal", "sync journal", "sync folder", "write ledger", "sync ledger", "remove journal", "sync folder"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the kernel was asked for while a new ledger was opened and written to once, as ``sync folder``, or as the words above."""
    if why := missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("ledger")
    path, trace = folder / "ledger.db", folder / "trace"

    traced: list[str | Path] = ["strace", "-y", "-e", f"trace={','.join(f'?{name}' for name in CALLS)}", "-o", trace]
    subprocess.run([*traced, sys.executable, "-c", WRITE, path], check=True, timeout=60, stdout=subprocess.DEVNULL)

    names = {f"{path}-journal": "journal", str(path): "ledger", str(folder): "folder", '"open"': "open", '"begin"': "begin", '"end"': "end"}
    found = [(line.partition("(")[0], next((names[name] for name in names if name in line), "")) for line in trace.read_text().splitlines()]
    steps = [f"{CALLS[call]} {name}" for call, name in found if call in CALLS]
    return [kind for kind, _ in itertools.groupby(steps[steps.index("write open") : steps.index("write end")])]


def test_a_statement_is_on_the_disk_when_it_returns(lines: list[str]) -> None:
    """
    What ``synchronous = EXTRA`` and ``journal_mode = DELETE`` stand for.

    The old page is safe before the new one is written; the new one before the journal goes; and without the last sync a power cut
    could bring the journal back, and with it the old page.
    """
    kinds = lines[lines.index("write begin") + 1 :]
    order = iter(kinds)
    assert all(step in order for step in SAFELY), kinds
    assert next(order, None) is None
    assert kinds.count("write ledger") == 1


def test_a_new_ledger_has_its_name_on_the_disk_before_its_first_byte(lines: list[str]) -> None:
    """And that of its journal, or a power cut leaves half a page and nothing that says so."""
    order = iter(lines[: lines.index("write begin")])
    assert all(step in order for step in SAFELY), lines
    assert lines.index("sync folder") < lines.index("write ledger")
