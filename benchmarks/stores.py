"""Stores of any size, as a long life would leave them, made quickly: rows and files are written in bulk, in the engine's own formats."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from reconciler import settings as settings_
from reconciler import settings_file
from reconciler.commands import lock as lock_command
from reconciler.commands.context import NodeContext, from_settings, measure_node
from reconciler.core import lifecycle
from reconciler.core import lock as locks
from reconciler.core.state import ActiveModel, Passed, Record, with_current
from reconciler.store import generations
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger, Listing
from reconciler.store.trees import digest_of
from tests.network import Document, Network

Rows = tuple[list[tuple[Any, ...]], list[tuple[Any, ...]], list[tuple[Any, ...]]]


def full(folder: Path, models: int, signed: Network | None = None) -> settings_.Settings:
    """
    Make a node in *folder* that holds *models* models of two blobs each, all active and up to date; return its settings.

    The network is *signed*, for who wants to publish more, else one of its own.
    """
    folder.mkdir(parents=True)
    signed = signed or Network()
    signed.now = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
    (folder / "reconcile.toml").write_text('[network]\nsnapshot = "published.json"\n')
    (folder / "root.json").write_bytes(signed.root())
    (folder / "published.json").write_bytes(signed.snapshot(*(model(signed, number) for number in range(models))))
    settings = settings_file.decode((folder / "reconcile.toml").read_bytes(), folder)
    context = from_settings(settings)
    fetched = lock_command.update_lock(context)
    _fill(context, fetched.verified_lock.lock, datetime.now(UTC))
    return settings


def model(signed: Network, number: int) -> Document:
    """Return the entry of the snapshot for the model of *number*."""
    entry = signed.model(f"model-{number}:v1", _bytes(number, 0))
    second = _bytes(number, 1)
    digits = hashlib.sha256(second).hexdigest()
    urls = [f"https://models.example.org/{digits}"]
    entry["artifacts"].append({"path": "config.json", "digest": f"sha256:{digits}", "size": len(second), "urls": urls})
    return entry


def _bytes(number: int, part: int) -> bytes:
    return f"{number}/{part}".encode() * 8


def _fill(context: NodeContext, lock: locks.Lock, now: datetime) -> None:
    layout, node = context.layout, measure_node(context)
    contents = {f"sha256:{hashlib.sha256(data).hexdigest()}": data for n in range(len(lock.model)) for data in (_bytes(n, 0), _bytes(n, 1))}
    for name, data in contents.items():
        path = layout.blob(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o444)
    entries: dict[str, ActiveModel] = {}
    rows: Rows = ([], [], [])
    for model in lock.model:
        listing = tuple(
            Listing(path=one.path, digest=one.digest, size=len(contents[one.digest]))
            for one in sorted(model.artifact, key=lambda one: one.path)
        )
        tree = digest_of(listing)
        _link(layout, tree, listing)
        rows[0].append((model.recipe, tree, msgspec.json.encode(listing)))
        engine = model.runtime.engine
        passed = Passed(
            tree=tree, smoke=lifecycle.smoke_digest(model), engine=engine, engine_version=node.engines[engine], device=node.device, at=now
        )
        record = Record(id=model.id, state="active", recipe=model.recipe, blobs=model.blobs, reason="up-to-date: nothing to do")
        rows[1].append((model.id, msgspec.json.encode(record), msgspec.json.encode(passed)))
        size = sum(entry.size for entry in listing)
        entries[model.id] = ActiveModel(
            id=model.id, tasks=model.tasks, runtime=model.runtime, path=generations.path_of(model.id), entrypoint=model.entrypoint,
            bytes=size, tree=tree,
        )  # fmt: skip
    for name in contents:
        seen = layout.blob(name).stat()
        rows[2].append((name, seen.st_size, seen.st_ino, seen.st_mtime_ns, now.strftime("%Y-%m-%dT%H:%M:%SZ")))
    _write_rows(layout, rows)
    generations.Generations(layout).swap(with_current(entries, lock.names, {}))


def _link(layout: Layout, tree: str, listing: tuple[Listing, ...]) -> None:
    folder = layout.tree(tree)
    folder.mkdir(parents=True)
    for entry in listing:
        os.link(layout.blob(entry.digest), folder / entry.path)


def _write_rows(layout: Layout, rows: Rows) -> None:
    with Ledger.writing(layout.ledger):
        pass
    with sqlite3.connect(layout.ledger) as connection:
        connection.executemany("INSERT INTO trees VALUES (?, ?, ?)", rows[0])
        connection.executemany("INSERT INTO models (id, record, passed) VALUES (?, ?, ?)", rows[1])
        connection.executemany("INSERT INTO blobs VALUES (?, ?, ?, ?, ?)", rows[2])
    connection.close()
