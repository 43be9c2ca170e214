"""
Whoever stands between a network and its nodes, in memory, as tests script it.

In the manner of python-tuf's repository simulator: a ``HostileNetwork`` publishes honestly and then serves what its script says
(withhold, replay, mix, fast-forward, equivocate, rotate, expire); a ``Node`` does with what it is served just what the engine does,
through the same pure functions, and remembers what it trusts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest

from reconciler.core import lock, trust
from reconciler.core.errors import ReconcileError
from tests.network import Document, Key, Network, compact, keys, payload_of, signatures_of


class HostileNetwork(Network):
    """Operators who sign in good faith, and a distributor who does not serve in good faith."""

    def __init__(self, name: str = "testnet", **settings: Any) -> None:
        super().__init__(name, **settings)
        self.roots: list[bytes] = [self.root()]
        self.snapshots: list[bytes] = []
        self.served = b""
        self._withheld = False

    # -- the operators

    def publish(self, *models: Document, **changes: Any) -> bytes:
        """Sign the next snapshot; it is served unless the distributor withholds it."""
        self.snapshots.append(self.snapshot(*models, **changes))
        if not self._withheld:
            self.served = self.snapshots[-1]
        return self.snapshots[-1]

    def change_keys(self, **changes: Any) -> bytes:
        """Sign and publish the next root."""
        self.roots.append(self.rotate(**changes))
        return self.roots[-1]

    def fresh_keys(self, role: str, count: int = 1) -> list[Key]:
        """Return keys that this network never used before."""
        return keys(f"{self.name}/{role}/{len(self.roots)}", count)

    def pass_time(self, **span: float) -> datetime:
        """Let time pass for everybody."""
        self.now += timedelta(**span)
        return self.now

    # -- the distributor

    def withhold(self) -> None:
        """Serve from now on what is served now, whatever is published."""
        self._withheld = True

    def replay(self, version: int) -> None:
        """Serve an old snapshot again."""
        self.served = self.of_version(version)

    def mix(self, payload: int, signatures: int) -> None:
        """Serve the payload of one snapshot under the signatures of another."""
        outer = json.loads(self.of_version(payload))
        self.served = compact(outer | {"signatures": signatures_of(self.of_version(signatures))})

    def disguise(self, data: bytes, payload_type: str) -> None:
        """Serve an envelope under another payload type, its signatures untouched."""
        self.served = compact(json.loads(data) | {"payloadType": payload_type})

    def of_version(self, version: int) -> bytes:
        """Return the snapshot that was published under *version*."""
        return next(data for data in self.snapshots if payload_of(data)["version"] == version)

    # -- thieves, with as many snapshot keys as they stole

    def fast_forward(self, stolen: Sequence[Key], **changes: Any) -> None:
        """Serve a snapshot of the last version that there is, so that no honest one could follow."""
        document = self.snapshot_document(version=2**53 - 1, **changes)
        self.served = self.sign_snapshot(document, stolen)

    def equivocate(self, version: int, *models: Document, stolen: Sequence[Key] | None = None) -> None:
        """Serve another snapshot under a version that was published."""
        kept = self.version
        self.served = self.snapshot(*models, version=version, signers=stolen)
        self.version = kept


class Node:
    """What a node remembers: root, trust state, and the lock that it acts on. Each ``sync`` acts, or raises and keeps all as it was."""

    def __init__(self, network: HostileNetwork) -> None:
        self.network = network
        self.root = trust.pin(network.roots[0])
        self.trust_state = trust.TrustState()
        self.held: bytes = b""
        #: What a node's clock is ahead of the network's.
        self.clock_error = timedelta()

    @property
    def now(self) -> datetime:
        """The time that this node believes in."""
        return self.network.now + self.clock_error

    def sync(self) -> lock.Lock:
        """Apply the roots, verify what is served, advance the trust state, compile."""
        self.update_root()
        verified = trust.verify(self.network.served, self.root, now=self.now, trust_state=self.trust_state)
        self.trust_state = trust.advance_state(self.trust_state, verified)
        compiled = lock.compile(verified)
        self.held = lock.encode(compiled)
        return compiled

    def update_root(self) -> None:
        """Take each newer root that is served, step by step; what was reached is kept when a later step is refused."""
        for data in self.network.roots:
            if trust.root_version(data) > self.root.version:
                self.root = trust.advance(self.root, data)


FLOOR = trust.TrustState()


def two_of_three() -> HostileNetwork:
    return HostileNetwork(root_keys=3, root_threshold=2, snapshot_keys=3, snapshot_threshold=2)


def refused(node: Node, error: type[ReconcileError]) -> ReconcileError:
    """Sync, expect *error*, and that nothing of what the node holds or remembers moved."""
    before = (node.root, node.trust_state, node.held)
    with pytest.raises(error) as found:
        node.sync()
    assert (node.root, node.trust_state, node.held) == before
    return found.value


def verify(network: Network, data: bytes, trust_state: trust.TrustState = FLOOR) -> trust.Verified:
    return trust.verify(data, network.trusted(), now=network.now, trust_state=trust_state)
