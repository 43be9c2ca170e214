"""The demo is the main job as a new user meets it: it runs here as it runs for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from reconciler.demo import network
from tests.node import run


def test_the_demo_plays_the_whole_life_and_ends_well(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RECONCILE")}
    place = tmp_path / "demo"

    ran = subprocess.run(
        [sys.executable, "-m", "reconciler", "demo", "--folder", str(place)], capture_output=True, text=True, timeout=240, env=environment
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    for said in (
        "✗ failed    weathercock:v1", "hash-mismatch", "· absent    colossus:v1", "● active    chatter:v1", "● active    weathercock:v1",
        "test job: passed", "No changes", "▪ archived  parrot:v1", "● active    parrot:v2", "○ inactive  compass:v1",
    ):  # fmt: skip
        assert " ".join(said.split()) in " ".join(ran.stdout.split()), said
    assert "Traceback" not in ran.stdout + ran.stderr


def test_the_committed_lock_is_what_the_committed_snapshot_compiles_to(tmp_path: Path) -> None:
    for name in network.FILES:
        (tmp_path / name).write_bytes((network.committed_folder() / name).read_bytes())
    (tmp_path / "reconcile.toml").write_text("")
    before = (tmp_path / "models.lock").read_bytes()
    (tmp_path / "models.lock").unlink()
    config = str(tmp_path / "reconcile.toml")

    assert run("lock", "--config", config).code == 0

    assert (tmp_path / "models.lock").read_bytes() == before


def test_the_committed_private_keys_are_nowhere() -> None:
    for path in network.committed_folder().iterdir():
        if path.is_file():
            assert b"PRIVATE KEY" not in path.read_bytes(), path
