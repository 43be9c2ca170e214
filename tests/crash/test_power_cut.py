"""Cut the power at a few points, where this machine lets us mount a loop device; ``make crash`` cuts before every effect."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash import power_cut
from tests.storenode import memory

STEP = 29


@pytest.fixture(scope="module", autouse=True)
def place() -> Iterator[Path]:
    """A folder in memory, on a machine where the power can be cut."""
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        if missing := power_cut.missing(Path(folder)):
            pytest.skip(missing)
        yield Path(folder)


def test_the_next_run_finishes_what_a_power_cut_left() -> None:
    found = power_cut.outcome("points", str(STEP))

    assert found["violations"] == []
    assert found["tried"] >= 6


def test_a_reported_success_survives_a_power_cut() -> None:
    assert power_cut.outcome("kept") is True


@pytest.mark.parametrize("what", ["fsync", "ledger"])
def test_without_its_syncs_a_reported_success_is_lost(what: str) -> None:
    """So that the others can be believed."""
    assert power_cut.outcome("kept", what) is False


def test_a_killed_power_cut_leaves_no_mount_and_no_loop_device(place: Path) -> None:
    image = place / "disk.img"
    with subprocess.Popen(power_cut.command("points", folder=place), stdout=subprocess.DEVNULL) as running:
        deadline = time.monotonic() + 30
        while not power_cut.loops(image):
            assert running.poll() is None
            assert time.monotonic() < deadline
        running.kill()

    while power_cut.loops(image):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert str(place) not in Path("/proc/self/mountinfo").read_text()
