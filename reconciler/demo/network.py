"""A network made on the spot: keys, a root with thresholds, and snapshots signed with the operator's own tools."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from msgspec import Struct

from reconciler.core.snapshot import Model, Snapshot
from reconciler.publish import keys, roots, snapshots
from reconciler.publish.keys import Pair


class Network(Struct, frozen=True, kw_only=True):
    """Two keys that must both sign snapshots, and a third that signs roots."""

    name: str
    owners: tuple[Pair, ...]
    signers: tuple[Pair, ...]
    root: bytes


def make(name: str, now: datetime, lifetime: timedelta) -> Network:
    """Return a new network with keys of its own."""
    owners, signers = (keys.generate(),), (keys.generate(), keys.generate())
    made = roots.new(name, now + lifetime, ([_public(pair) for pair in owners], 1), ([_public(pair) for pair in signers], 2))
    return Network(name=name, owners=owners, signers=signers, root=roots.sign(made, _private(owners[0])))


def snapshot(network: Network, models: tuple[Model, ...], version: int, now: datetime, lifetime: timedelta) -> bytes:
    """Return a snapshot of *models*, signed by all of the network's signers."""
    empty = snapshots.new(network.name, now=now, lifetime=lifetime, version=version)

    def listed(found: Snapshot) -> Snapshot:
        for model in models:
            found = snapshots.with_model(found, model)
        return found

    data = snapshots.edited(empty, listed, now=now).data
    for pair in network.signers:
        data = snapshots.sign(data, _private(pair), now=now)
    return data


def _public(pair: Pair) -> keys.PublicKey:
    return keys.load_public(pair.public_pem.encode())


def _private(pair: Pair) -> Any:
    return keys.load_private(pair.private_pem, lambda: b"")
