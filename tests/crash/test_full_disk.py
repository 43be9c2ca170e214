"""A disk that is full in the middle of a run costs that run; when there is room again, the next one ends where an untouched one does."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.crash import power_cut
from tests.crash.power_cut import ALONE
from tests.storenode import memory

#: ``make crash`` takes every step.
STEPS = {"blocks": 3, "inodes": 7}


@pytest.mark.parametrize("kind", STEPS)
def test_a_disk_that_fills_up_at_any_point(tmp_path: Path, kind: str) -> None:
    found = outcome(tmp_path, kind, str(STEPS[kind]))

    assert found["violations"] == []
    assert found["refused"] > 5


def test_a_real_disk_that_fills_up(tmp_path: Path) -> None:
    if why := power_cut.missing(tmp_path):
        pytest.skip(why)

    with tempfile.TemporaryDirectory(dir=memory()) as place:
        found = printed([*ALONE, sys.executable, "-m", "tests.crash.full_disk", place, "ext4", "9"])

    assert found["violations"] == []
    assert found["refused"] > 5


def test_what_the_network_took_away_stops_serving_though_the_disk_has_no_free_block(tmp_path: Path) -> None:
    assert outcome(tmp_path, "last-block")["violations"] == []


def test_a_disk_with_space_that_takes_no_more_files_is_said_to_lack_inodes_and_no_model_is_blamed(tmp_path: Path) -> None:
    assert outcome(tmp_path, "no-inodes")["violations"] == []


def test_a_disk_that_is_remounted_read_only_is_said_to_be_so_and_no_model_is_blamed(tmp_path: Path) -> None:
    assert outcome(tmp_path, "read-only")["violations"] == []


def outcome(folder: Path, *what: str) -> dict[str, Any]:
    """Return what was found on a small disk that is mounted at *folder*."""
    namespace = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no mount namespace: unshare --mount --map-root-user")

    return printed([*namespace, sys.executable, "-m", "tests.crash.full_disk", str(folder), *what])


def printed(command: list[str]) -> dict[str, Any]:
    """Return the document that *command* prints."""
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found
