"""A checkout as CI has it: the committed files of a node, in git, with profiles of two kinds of node, and no store."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from reconciler.core import lock as locks
from reconciler.core import trust
from tests.network import Document, Network
from tests.node import Ran, run

GPU = 'memory = "64GiB"\ndisk = "500GiB"\nreserve = "1GiB"\n\n[engines]\nllama-cpp = "0.3.16"\n\n[[gpu]]\nname = "A"\nmemory = "24GiB"\n'
CPU = 'memory = "64GiB"\ndisk = "100GiB"\nreserve = "1GiB"\n\n[engines]\nllama-cpp = "0.3.16"\n'
GIB = 1 << 30


class Repository:
    """A repository with a snapshot that its network signs, one commit after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = Network()
        self.network.now = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
        (folder / "nodes").mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")
        (folder / "reconcile.toml").write_text('[network]\nsnapshot = "snapshot.json"\n')
        (folder / "root.json").write_bytes(self.network.root())
        (folder / "nodes/gpu.toml").write_text(GPU)
        (folder / "nodes/cpu.toml").write_text(CPU)

    def git(self, *words: str) -> None:
        identity = ["-c", "user.name=ci", "-c", "user.email=ci@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=self.folder, check=True, capture_output=True)

    def model(self, name: str, size: int = GIB, **changes: Any) -> Document:
        made = self.network.model(name, name.encode(), urls=["https://models.example.org/x"], **changes)
        made["artifacts"][0]["size"] = size
        return made

    def write(self, *models: Document, **changes: Any) -> bytes:
        """Write the next snapshot and its lock into the work tree."""
        return self.put(self.network.snapshot(*models, **changes))

    def put(self, envelope: bytes) -> bytes:
        root = trust.pin((self.folder / "root.json").read_bytes())
        (self.folder / "snapshot.json").write_bytes(envelope)
        compiled = locks.compile(trust.open_snapshot(envelope, root))
        (self.folder / "models.lock").write_bytes(locks.encode(compiled))
        return envelope

    def commit(self, *models: Document, **changes: Any) -> bytes:
        made = self.write(*models, **changes)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=snapshot")
        return made

    def run(self, *words: str) -> Ran:
        return run(*words, "--config", str(self.folder / "reconcile.toml"))

    def plan(self, *words: str, nodes: tuple[str, ...] = ("gpu", "cpu")) -> Ran:
        named = [word for name in nodes for word in ("--node", str(self.folder / f"nodes/{name}.toml"))]
        return self.run("plan", *named, *words)

    def rules(self, *words: str, nodes: tuple[str, ...] = ("gpu", "cpu")) -> list[tuple[str, str, str]]:
        """Return the broken rules, each with its node and model; the exit code is as they ask."""
        ran = self.plan("--json", *words, nodes=nodes)
        found = [(one["rule"], one["node"], one["model"]) for one in ran.json["failures"]]
        assert ran.code == (2 if found else 0), ran
        return found
