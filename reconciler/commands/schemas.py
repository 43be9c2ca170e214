"""
JSON Schemas of everything that other programs read, made from the very types that read and write it.

``python -m reconciler.commands.schemas FOLDER`` writes them; a test compares the committed ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from reconciler.commands.status import Status
from reconciler.core.dsse import Envelope
from reconciler.core.events import (
    Announced,
    BlobReady,
    FetchProgress,
    Incident,
    ModelDone,
    ModelPhase,
    Notice,
    RunEnded,
    RunStarted,
    Swapped,
)
from reconciler.core.plan import Plan
from reconciler.core.snapshot import Snapshot
from reconciler.core.trust import TrustRoot
from reconciler.fleet.assess import FleetReport
from reconciler.fleet.statement import NodeReport
from reconciler.settings import Settings
from reconciler.store.index import Index
from reconciler.store.ledger import LoggedIncident

Events = RunStarted | FetchProgress | BlobReady | ModelPhase | ModelDone | Swapped | Announced | Incident | Notice | RunEnded

DOCUMENTS: dict[str, object] = {
    "envelope": Envelope,
    "root": TrustRoot,
    "snapshot": Snapshot,
    "settings": Settings,
    "plan": Plan,
    "status": Status,
    "incidents": tuple[LoggedIncident, ...],
    "events": Events,
    "index": Index,
    "node-status": NodeReport,
    "fleet-report": FleetReport,
}


def schema(kind: object) -> bytes:
    """Return the JSON Schema (2020-12) of *kind*."""
    made: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(kind)}
    if kind is Settings:
        _as_in_the_file(made)
    return msgspec.json.format(msgspec.json.encode(made, order="sorted"), indent=2) + b"\n"


def _as_in_the_file(made: dict[str, Any]) -> None:
    """Let the tables of servers stand beside that of llama-cpp, as they do in the file: each under the name of its engine."""
    runtimes = made["$defs"]["Runtimes"]
    runtimes["additionalProperties"] = runtimes["properties"].pop("servers")["additionalProperties"]
    del made["$defs"]["Settings"]["properties"]["runtime"]["default"]["servers"]


def main() -> None:
    """Write every schema into the folder named on the command line."""
    for name, kind in DOCUMENTS.items():
        Path(sys.argv[1], f"{name}.schema.json").write_bytes(schema(kind))


if __name__ == "__main__":
    main()
