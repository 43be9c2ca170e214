"""Statuses of nodes that tests control: signed, and as wrong as a test likes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from reconciler.fleet import statement
from reconciler.fleet.statement import NodeReport, ReportedModel, ReportedSnapshot
from tests.network import Key

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
DIGEST = "sha256:" + "0" * 64
MODEL = ReportedModel(id="a:v1", state="active", reason="up-to-date", tree=DIGEST, since=NOW - timedelta(hours=5))


class Member:
    """A node of a fleet, with a key that follows from its name."""

    def __init__(self, name: str) -> None:
        self.name, self.key = name, Key(f"node/{name}")
        self.sequence = 0

    def report(self, *models: ReportedModel, **changes: Any) -> NodeReport:
        """Return the next status, unsigned, with *changes* on top."""
        self.sequence += 1
        made = NodeReport(
            schema=1,
            network="testnet",
            node=self.name,
            key=self.key.pem,
            sequence=self.sequence,
            at=NOW - timedelta(minutes=10),
            program="0.2.0",
            snapshot=ReportedSnapshot(version=7, digest=DIGEST),
            lock=DIGEST,
            generation=3,
            active_digest=DIGEST,
            models=models or (MODEL,),
        )
        return msgspec.structs.replace(made, **changes)

    def status(self, *models: ReportedModel, signer: Key | None = None, **changes: Any) -> bytes:
        """Return the next status, signed by this node or by *signer*."""
        return statement.sign(self.report(*models, **changes), (signer or self.key).private)


def enroll(keys: Path, *members: Member) -> None:
    """Put the keys of *members* where an operator keeps them."""
    keys.mkdir(exist_ok=True)
    for member in members:
        (keys / f"{member.name}.pub").write_text(member.key.pem)
