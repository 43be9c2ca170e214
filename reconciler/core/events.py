"""
What a run reports, as values: one stream of events feeds the terminal, ``--json``, the ledger's incidents and history, the metrics and
the tests.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class Event(
    Struct,
    frozen=True,
    kw_only=True,
    tag_field="type",
    tag=lambda name: "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-"),
    omit_defaults=True,
):
    """Something that happened, as it happens."""


class RunStarted(Event, frozen=True, kw_only=True):
    """A run begins; *lock* is the digest of the lock that everything after speaks of."""

    lock: str  #: Digest of the lock.
    generation: int  #: The generation that is active when the run begins.
    models: int  #: How many models the plan has.
    download_bytes: int  #: Bytes that the plan downloads.


class FetchProgress(Event, frozen=True, kw_only=True):
    """*done* bytes of *total* are here, *rate* of them a second, *hashed* of them verified so far."""

    digest: str  #: The blob.
    done: int  #: Bytes that have arrived.
    total: int  #: Bytes of the blob.
    rate: int = 0  #: Bytes per second.
    hashed: int = 0  #: Bytes that were hashed so far.
    resumed: int = 0  #: Of the bytes that are here, those that an earlier run left.
    source: str = ""  #: URL that it is downloaded from.


class HashProgress(Event, frozen=True, kw_only=True):
    """*done* bytes of *total* of what is on the disk are hashed again. For people alone: no stream of events has it."""

    done: int
    total: int


class BlobReady(Event, frozen=True, kw_only=True):
    """A blob was verified and has its name now."""

    digest: str
    size: int  #: Bytes.
    sources: tuple[str, ...] = ()  #: URLs that the bytes came from; empty where they were in staging already.


class ModelPhase(Event, frozen=True, kw_only=True):
    """A model enters a phase of its installation."""

    model: str  #: Its model id.
    phase: Literal["waiting", "fetching", "unpacking", "testing", "tested", "archiving", "restoring", "removing"]
    detail: str = ""  #: More about the phase, for people.


class ModelDone(Event, frozen=True, kw_only=True):
    """A model reached the state in which this run leaves it."""

    model: str  #: Its model id.
    state: str  #: The state in which the run leaves it.
    reason: str = ""  #: Why; begins with a word of a closed list.


class Swapped(Event, frozen=True, kw_only=True):
    """A generation became the active one."""

    generation: int  #: Its number.
    added: tuple[str, ...] = ()  #: Model ids that became active.
    removed: tuple[str, ...] = ()  #: Model ids that stopped being active.
    what: str = ""  #: Why the set changed, for people.


class Announced(Event, frozen=True, kw_only=True):
    """The servers and the operator's hooks were told of what serves now. A run announces at most one set, or the one it returns to."""

    generation: int  #: Its number.
    added: tuple[str, ...] = ()  #: Model ids that became active since the set before.
    removed: tuple[str, ...] = ()  #: Model ids that stopped being active.
    what: str = ""  #: Why the set changed, for people.


class Incident(Event, frozen=True, kw_only=True):
    """A check failed, or something was refused, quarantined or repaired."""

    kind: str  #: The kind, a word of a closed list.
    model: str = ""  #: Model id, if it is about one.
    blob: str = ""  #: Digest, if it is about a blob.
    source: str = ""  #: URL of the source that is at fault.
    detail: str = ""  #: What happened, for people.


class Notice(Event, frozen=True, kw_only=True):
    """A sentence that people should read, and that is no incident."""

    level: Literal["debug", "info", "warning"]
    text: str  #: The sentence.


class RunEnded(Event, frozen=True, kw_only=True):
    """A run is over."""

    lock: str  #: Digest of the lock.
    generation: int  #: The generation that is active at the end.
    active: int  #: How many models are active.
    failed: int  #: How many models failed.
    unfetched: int = 0  #: Of how many models no source gave the bytes.
    changed: bool  #: Whether the run changed anything.
    seconds: float  #: How long it took.
