"""
Refuse every step: the n-th call that touches the disk fails, once or from then on.

A refusal leaves as one of our errors, never as another exception; what is active stays whole; and when the disk is willing again the
next run ends where an untouched one ends.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.scenario import REFUSED, UNTOUCHED, Scene, differences, effects_of_a_run, failing_at, interrupted_run, untouched_end
from tests.storenode import memory

ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EINTR)
#: ``make crash`` tries every call.
STEP = 23


@pytest.fixture
def folders() -> Iterator[Callable[[], Path]]:
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        numbers = iter(range(1 << 30))
        yield lambda: Path(folder, str(next(numbers)))


@pytest.mark.parametrize("once", [True, False], ids=["once", "from-then-on"])
def test_a_refused_step_costs_a_run_and_nothing_else(folders: Callable[[], Path], once: bool) -> None:
    expected = untouched_end(folders())
    calls = len(effects_of_a_run(folders(), opening=True))
    assert calls > 800

    violations = []
    for turn, number in enumerate(range(1 + once * 5, calls, STEP)):
        code = ERRORS[turn % len(ERRORS)]
        found = faults_after(folders(), number, code, expected, once=once)
        violations += [f"call {number}, {errno.errorcode[code]}: {text}" for text in found]

    assert not violations, "\n".join(violations)


def faults_after(root: Path, number: int, code: int, expected: dict[str, object], *, once: bool) -> list[str]:
    """Return what is wrong after a run whose *number*-th call was refused with *code*, and after the next one."""
    ended = interrupted_run(root, failing_at(number, code, once=once), opening=True)
    scene = Scene(root)
    found = [] if ended in {UNTOUCHED, REFUSED} else [f"the child exited with {ended}"]
    found += scene.faults()
    scene.run()
    found += scene.faults()
    return found + differences(scene.end(), expected)
