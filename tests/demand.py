"""What a test needs of the machine, and the sentence with which it is skipped where that is lacking."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.sandbox import choose
from reconciler.sandbox.process import Mode

#: The real one, whatever a test puts in its place.
_probe = choose.probe


def needs_root(what: str) -> None:
    if os.getuid() != 0:
        pytest.skip(f"not root: it takes root {what}")


@contextlib.contextmanager
def own_disk(place: Path, mebibytes: int, what: str) -> Iterator[Path]:
    """Give *place* as a file system of its own, in memory; without root, *what* is not run."""
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip(f"mounting a tmpfs needs root: {what} is not run here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def needs_bubblewrap() -> Path:
    found = choose.find_bubblewrap()
    if isinstance(found, str):
        pytest.skip(f"bubblewrap is not installed: {found}")
    if not _probed("bubblewrap").works:
        _refuse_our_own_fault(_probed("bubblewrap").detail)
        pytest.skip(f"bubblewrap cannot work on this machine: {_probed('bubblewrap').detail}")
    return found


def working(mode: Mode) -> Mode:
    """Return *mode*, if this kernel has what it takes."""
    if mode == "bubblewrap":
        needs_bubblewrap()
    elif not _probed("landlock").works:
        _refuse_our_own_fault(_probed("landlock").detail)
        pytest.skip(f"this kernel has no Landlock that will do: {_probed('landlock').detail}")
    return mode


def _refuse_our_own_fault(detail: str) -> None:
    """Fail where the machine is not what is lacking: a sandbox that we broke ourselves would skip every test of it."""
    lacking = ("bwrap: ", "SetupFailed: ")
    if not any(word in detail for word in lacking):
        pytest.fail(f"the sandbox is broken, and not for want of anything: {detail}")


@functools.cache
def _probed(mode: Mode) -> choose.ProbeResult:
    return _probe(mode)
