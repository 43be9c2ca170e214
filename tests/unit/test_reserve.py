"""The room that is kept for a full disk: there, real, and never in anybody's way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from reconciler.store import housekeeping

FULL, ROOMY = housekeeping.RESERVE_BYTES - 1, 4 * housekeeping.RESERVE_BYTES


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set what is free, as the file system says."""
    return lambda size: monkeypatch.setattr(housekeeping, "_free", lambda _: size)


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_it_is_set_aside_where_there_is_plenty_and_let_go_of_on_a_full_disk(tmp_path: Path, free: Callable[[int], None]) -> None:
    path = tmp_path / "ballast"
    free(ROOMY)
    with housekeeping.released_when_full(path):
        assert not path.exists()
    assert blocks(path) >= housekeeping.RESERVE_BYTES

    free(FULL)
    with housekeeping.released_when_full(path):
        assert not path.exists()
    assert not path.exists(), "the disk is full still"


def test_a_copy_of_holes_is_filled(tmp_path: Path, free: Callable[[int], None]) -> None:
    path = tmp_path / "ballast"
    path.touch()
    os.truncate(path, housekeeping.RESERVE_BYTES)
    free(ROOMY)

    with housekeeping.released_when_full(path):
        pass

    assert blocks(path) >= housekeeping.RESERVE_BYTES


def test_a_link_in_its_place_is_not_followed(tmp_path: Path, free: Callable[[int], None]) -> None:
    victim, path = tmp_path / "victim", tmp_path / "ballast"
    victim.write_bytes(b"precious")
    path.symlink_to(victim)
    for size in (ROOMY, FULL):
        free(size)
        with housekeeping.released_when_full(path):
            pass

    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir])
def test_what_lies_in_its_place_stops_no_run(tmp_path: Path, free: Callable[[int], None], plant: Callable[[Path], None]) -> None:
    plant(tmp_path / "ballast")
    free(ROOMY)

    with housekeeping.released_when_full(tmp_path / "ballast"):
        pass
