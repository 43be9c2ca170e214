"""
Reads statuses: which of them count, and why the others do not.

Rules that hold here:

1. What counts for a node is its newest status, if the register's key of that node signed it, for this network, and it is fresh. All other
   files count for nothing, whatever they say.
2. Each file that counts for nothing has one reason, and none ends the reading: one bad file must not hide ten thousand good ones.
3. A node whose newest status is stale is *silent*. What it last said is kept apart: a model that ends the machine is seen that way.
4. Two different statuses with one number are both refused: one of them was made by somebody who holds the node's key.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from msgspec import Struct

from reconciler.core import digest
from reconciler.core.errors import BadSignature, SettingsError, TooLarge, TrustError, UsageError
from reconciler.fleet import statement
from reconciler.fleet.register import Register, Seen
from reconciler.fleet.statement import NodeReport, Unverified

Refusal = Literal["malformed", "too-large", "unknown-node", "forged", "foreign", "replayed", "two-faced", "from-the-future", "unreadable"]
#: How far a node's clock may be ahead.
SKEW_SECONDS = 300.0


class RefusedFile(Struct, frozen=True, kw_only=True):
    """A file that counts for nothing."""

    file: str  #: Its path, relative to the place that was read.
    reason: Refusal  #: Why.
    node: str = ""  #: The node that it names, which is not proved; empty where it names none.


class Collected(Struct, frozen=True, kw_only=True):
    """What statuses say."""

    network: str  #: The network that the statuses are of.
    files: int  #: Files that were read.
    fresh: tuple[NodeReport, ...]  #: The newest status of each node that sent one in time, sorted by node.
    silent: tuple[NodeReport, ...]  #: The newest status of each other node that counts.
    missing: tuple[str, ...]  #: Nodes whose key is known and of which there is no status.
    refused: tuple[RefusedFile, ...]  #: Files that count for nothing, sorted.
    seen: dict[str, Seen]  #: What the register is to remember.


#: A status: its name, and what returns its bytes, at most one more than it may have; that raises OSError.
Status = tuple[str, Callable[[], bytes]]


def collect(statuses: Iterable[Status], register: Register, *, now: datetime, stale_seconds: float, network: str = "") -> Collected:
    """
    Return what *statuses* say. Changes nothing.

    *network*: its name; empty: the one of which all verified statuses are.

    Raises:
        SettingsError: there is no folder with nodes' keys.
        UsageError: the statuses are of several networks, and *network* is empty.
    """
    register.require()
    refused: list[RefusedFile] = []
    verified = list(_verified(statuses, register, now, refused))
    network = network or _only_network([found.report for _, found in verified])
    newest, seen = _newest(verified, network, register.seen(), refused)
    fresh_from = now - timedelta(seconds=stale_seconds)
    reports = [newest[node].report for node in sorted(newest)]
    return Collected(
        network=network,
        files=len(verified) + sum(one.reason not in {"foreign", "replayed", "two-faced"} for one in refused),
        fresh=tuple(report for report in reports if report.at >= fresh_from),
        silent=tuple(report for report in reports if report.at < fresh_from),
        missing=tuple(sorted(register.nodes() - newest.keys())),
        refused=tuple(sorted(refused, key=lambda one: one.file)),
        seen=seen,
    )


def is_status(name: str) -> bool:
    """Return whether a file called *name*, which may be a path, is meant as a status."""
    return name.endswith(".json") and not name.rpartition("/")[2].startswith(".")


def in_folder(folder: Path) -> Iterator[Status]:
    """
    Yield every ``*.json`` file in *folder* and below it, by its relative path, in order; links are not followed.

    Raises:
        SettingsError: there is no such folder.
    """
    if not folder.is_dir():
        raise SettingsError(f"there is no folder {folder}", hint="name the folder that the nodes' statuses are collected in")
    for parent, folders, names in os.walk(folder):
        folders.sort()
        below = "" if parent == str(folder) else f"{os.path.relpath(parent, folder)}/"
        for name in sorted(names):
            if is_status(name):
                yield f"{below}{name}", functools.partial(_read_file, f"{parent}/{name}")


def _read_file(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        return file.read(statement.MAX_BYTES + 1)


def _verified(
    statuses: Iterable[Status], register: Register, now: datetime, refused: list[RefusedFile]
) -> Iterator[tuple[str, Unverified]]:
    """Yield the statuses that the key of their node signed; the others go to *refused*."""
    latest = now + timedelta(seconds=SKEW_SECONDS)
    for name, read in statuses:
        try:
            found = statement.read(read())
        except (OSError, TrustError) as error:
            reason: Refusal = "too-large" if isinstance(error, TooLarge) else "unreadable" if isinstance(error, OSError) else "malformed"
            refused.append(RefusedFile(file=name, reason="forged" if isinstance(error, BadSignature) else reason))
            continue
        node = found.report.node
        key = register.key(node)
        if key is None:
            refused.append(RefusedFile(file=name, reason="unknown-node", node=node))
        elif not found.signed_by(key):
            refused.append(RefusedFile(file=name, reason="forged", node=node))
        elif found.report.at > latest:
            refused.append(RefusedFile(file=name, reason="from-the-future", node=node))
        else:
            yield name, found


def _only_network(reports: list[NodeReport]) -> str:
    names = sorted({report.network for report in reports})
    if len(names) > 1:
        raise UsageError(f"the statuses are of several networks: {', '.join(names[:5])}", hint="name one with --network")
    return names[0] if names else ""


def _newest(
    verified: list[tuple[str, Unverified]], network: str, seen: dict[str, Seen], refused: list[RefusedFile]
) -> tuple[dict[str, Unverified], dict[str, Seen]]:
    """Return the newest status of each node, and what is to be remembered of each."""
    newest: dict[str, Unverified] = {}
    two_faced: dict[str, int] = {}
    for name, found in sorted(verified, key=lambda one: one[1].report.sequence):
        report = found.report
        if report.network != network:
            refused.append(RefusedFile(file=name, reason="foreign", node=report.node))
            continue
        known, other = seen.get(report.node), newest.get(report.node)
        if known is not None and report.sequence < known.sequence:
            refused.append(RefusedFile(file=name, reason="replayed", node=report.node))
            continue
        twice = known is not None and report.sequence == known.sequence and digest.of(found.payload) != known.digest
        if twice or (other is not None and other.report.sequence == report.sequence and other.payload != found.payload):
            refused.append(RefusedFile(file=name, reason="two-faced", node=report.node))
            two_faced[report.node] = report.sequence
            continue
        newest[report.node] = found
    counted = {node: found for node, found in newest.items() if two_faced.get(node) != found.report.sequence}
    remembered = {node: Seen(sequence=found.report.sequence, digest=digest.of(found.payload)) for node, found in counted.items()}
    return counted, seen | remembered
