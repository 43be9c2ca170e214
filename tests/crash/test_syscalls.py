"""Kill a whole run at a few of its system calls, by strace; ``make crash`` kills at them all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash import syscalls
from tests.crash.syscalls import Point, Traced


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    if why := syscalls.missing():
        pytest.skip(why)
    with syscalls.traced() as traced:
        yield traced


@pytest.mark.parametrize("point", [Point("rename", 2), Point("symlink", 2), Point("pwrite64", 120), Point("linkat", 1, follow=True)])
def test_the_next_run_finishes_what_a_killed_one_left(traced: Traced, point: Point) -> None:
    assert traced.killed(point) == []
