"""
The ledger: what the file system cannot record. When blobs were verified, which tests passed, attempts, incidents, history.

Rules that hold here:

1. Losing the ledger costs hashing and testing again, never a download and never trust.
2. Reading leaves no trace, not even a journal (``ledger_database``).
3. A damaged ledger is renamed by the next writer, with an incident, and a new one is started. A damaged row counts as missing.
4. A ledger that a newer version wrote is neither read nor changed (``ledger_database``, rule 3).
"""

from __future__ import annotations

import contextlib
import sqlite3
import stat
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from reconciler import files
from reconciler.core import units
from reconciler.core.errors import StoreError
from reconciler.core.events import Incident
from reconciler.core.state import Passed, Record, TreeSeen
from reconciler.core.text import printable
from reconciler.core.trust import TrustState
from reconciler.ports import TestReport
from reconciler.store import atomic, ledger_database, test_facts

MAX_INCIDENTS = 5_000
MAX_HISTORY = 2_000
#: Characters of an incident's text.
MAX_TEXT = 2_000
#: An incident that repeats within so many seconds is counted, and not logged again.
REPEAT_SECONDS = 24 * 3600
_INCIDENT_COUNTS = "incidents/"
_INCIDENT_FIELDS = ("kind", "model", "blob", "source", "detail")
_T = TypeVar("_T")
#: The fact that says when each blob in cold storage was hashed and found good.
COLD_VERIFIED = "cold"


class Listing(Struct, frozen=True, kw_only=True):
    """One file of a tree: its path in the tree, its blob, and its size in bytes."""

    path: str
    digest: str
    size: int


class Verification(Struct, frozen=True, kw_only=True):
    """When the file with this inode, size in bytes and modification time was hashed and found good."""

    size: int
    inode: int
    mtime_ns: int
    verified_at: datetime


class LoggedIncident(Struct, frozen=True, kw_only=True):
    """An incident as it was logged; *times* counts its repetitions until *last_at*."""

    id: int  #: Its number.
    at: datetime  #: When it happened first.
    kind: str  #: A word of a closed list.
    model: str  #: Model id, or empty.
    blob: str  #: Digest, or empty.
    source: str  #: URL of the source at fault, or empty.
    detail: str  #: What happened.
    times: int = 1  #: How often within a day.
    last_at: datetime | None = None  #: When it happened last, if more than once.


class Change(Struct, frozen=True, kw_only=True):
    """A set of active models that the servers and hooks were told of: by which command and why. One for each run that changed it."""

    at: datetime
    generation: int
    actor: str
    what: str
    lock: str
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


class Ledger:
    """The ledger of a store. Reading works while another process writes."""

    def __init__(self, connection: sqlite3.Connection | None, path: Path | None = None) -> None:
        self._connection = connection
        self._path = path
        self._mutex = threading.RLock()
        #: The file is damaged: it reads as an empty ledger.
        self.damaged = False

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    @contextlib.contextmanager
    def reading(cls, path: Path) -> Iterator[Ledger]:
        """Open for reading, without a trace; a missing or damaged ledger reads as an empty one."""
        with contextlib.ExitStack() as stack:
            connection = ledger_database.open_readable(path, stack)
            try:
                ledger = cls(connection)  # without the path: a reader leaves no trace, not even to find out why the system refuses
                ledger.damaged = connection is None and ledger_database.is_not_empty(path)
                yield ledger
            finally:
                if connection is not None:
                    connection.close()

    @classmethod
    @contextlib.contextmanager
    def writing(cls, path: Path) -> Iterator[Ledger]:
        """Open for writing; the caller holds the store."""
        ledger = cls._opened(path)
        try:
            yield ledger
        finally:
            ledger.close()

    @classmethod
    def _opened(cls, path: Path) -> Ledger:
        with files.translate_errors(f"open {path}"):
            if (path.is_symlink() or path.exists()) and not stat.S_ISREG(path.lstat().st_mode):
                return cls._start_new(path, "it is no plain file")
            if not path.exists():
                path.touch(0o644)  # SQLite syncs its name with that of its first journal
        try:
            return cls(ledger_database.open_writable(path), path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise ledger_database.store_error(error, path) from error
            return cls._start_new(path, str(error))

    @classmethod
    def _start_new(cls, path: Path, error: str) -> Ledger:
        aside = path.with_name(f"{path.name}.damaged")
        atomic.delete(aside)
        atomic.delete(path.with_name(f"{path.name}-journal"))
        atomic.rename(path, aside)
        try:
            ledger = cls(ledger_database.open_writable(path), path)
        except sqlite3.DatabaseError as refused:
            raise ledger_database.store_error(refused, path) from refused
        detail = f"the ledger was damaged ({error}); it is kept as {aside.name}"
        ledger.log_incident(Incident(kind="crash-recovered", detail=detail), datetime.now(UTC))
        return ledger

    def close(self) -> None:
        """Close the database."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # -- facts -------------------------------------------------------------------------------------

    def fact(self, key: str, kind: type[_T]) -> _T | None:
        """Return the fact *key*, or None."""
        for (value,) in self._rows("SELECT value FROM facts WHERE key = ?", (key,)):
            found: _T | None = ledger_database.decode(value, kind)
            return found
        return None

    def set_fact(self, key: str, value: object) -> None:
        """Store *value* as the fact *key*; None deletes it."""
        if value is None:
            self._write("DELETE FROM facts WHERE key = ?", (key,))
        else:
            self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, msgspec.json.encode(value)))

    def set_running(self, *, running: bool) -> None:
        """Record that a run began, or ended: a run that was interrupted is finished by the next."""
        self.set_fact("running", True if running else None)

    def trust_state(self) -> TrustState | None:
        """Return the copy of the trust state, or None."""
        return self.fact("floor", TrustState)

    # -- blobs and trees ---------------------------------------------------------------------------

    def verifications(self) -> dict[str, Verification]:
        """Return the last verification of each blob, by digest."""
        return {
            name: Verification(size=size, inode=inode, mtime_ns=mtime_ns, verified_at=_parse_time(at))
            for name, size, inode, mtime_ns, at in self._rows("SELECT digest, size, inode, mtime_ns, verified_at FROM blobs")
        }

    def record_verified(self, found: Mapping[str, Verification]) -> None:
        """Record, in one transaction, that blobs were hashed and found good; *found* is by digest: one at least, a hundred at most."""
        rows = ((name, one.size, one.inode, one.mtime_ns, units.rfc3339(one.verified_at)) for name, one in found.items())
        self._write(ledger_database.insertion_of_blobs(len(found)), [value for row in rows for value in row])

    def forget_blobs(self, names: Collection[str]) -> None:
        """Delete, in one transaction, the records of blobs that are missing, damaged or about to be deleted."""
        self._write("DELETE FROM blobs WHERE digest IN (SELECT value FROM json_each(?))", (msgspec.json.encode([*names]).decode(),))

    def trees(self) -> dict[str, tuple[str, tuple[Listing, ...]]]:
        """Return the digest and the files of each tree, by recipe."""
        rows = self._rows("SELECT recipe, tree, listing FROM trees")
        found = ((recipe, tree, ledger_database.decode(listing, tuple[Listing, ...])) for recipe, tree, listing in rows)
        return {recipe: (tree, listing) for recipe, tree, listing in found if listing is not None}

    def listing(self, recipe: str) -> tuple[Listing, ...]:
        """Return the files of the tree of *recipe*; none where it is unknown."""
        rows = self._rows("SELECT listing FROM trees WHERE recipe = ?", (recipe,))
        return (ledger_database.decode(rows[0][0], tuple[Listing, ...]) if rows else None) or ()

    def record_tree(self, seen: TreeSeen, listing: tuple[Listing, ...]) -> None:
        """Record the tree of a recipe, and its files."""
        self._write("INSERT OR REPLACE INTO trees VALUES (?, ?, ?)", (seen.recipe, seen.digest, msgspec.json.encode(listing)))

    def forget_trees(self, names: Collection[str]) -> None:
        """Delete, in one transaction, the records of trees, by their own digests; several recipes may have one."""
        self._write("DELETE FROM trees WHERE tree IN (SELECT value FROM json_each(?))", (msgspec.json.encode([*names]).decode(),))

    # -- models ------------------------------------------------------------------------------------

    def records(self) -> dict[str, Record]:
        """Return the record of each model, by id."""
        found = (ledger_database.decode(value, Record) for (value,) in self._rows("SELECT record FROM models"))
        return {record.id: record for record in found if record is not None}

    def put(self, record: Record) -> None:
        """Store *record*."""
        upsert = "INSERT INTO models (id, record) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record"
        self._write(upsert, (record.id, msgspec.json.encode(record)))

    def forget(self, model: str) -> None:
        """Delete all records of a model."""
        self._write("DELETE FROM models WHERE id = ?", (model,))
        test_facts.forget(self, model)

    def passed(self) -> dict[str, Passed]:
        """Return the last passed test of each model."""
        rows = self._rows("SELECT id, passed FROM models WHERE passed IS NOT NULL")
        found = ((model, ledger_database.decode(value, Passed)) for model, value in rows)
        return {model: passed for model, passed in found if passed is not None}

    def tested(self, model: str, report: TestReport, passed: Passed | None, at: datetime) -> None:
        """Record a test job's report; *passed* is None where the model failed it, or could not be tested (``test_facts``)."""
        if not test_facts.record(self, model, report, passed, at):
            return
        blank = msgspec.json.encode(Record(id=model, state="pending"))
        self._write("INSERT OR IGNORE INTO models (id, record) VALUES (?, ?)", (model, blank))
        row = (msgspec.json.encode(report), msgspec.json.encode(passed) if passed else None, units.rfc3339(at), model)
        self._write("UPDATE models SET report = ?, passed = ?, tested_at = ? WHERE id = ?", row)

    def report(self, model: str) -> tuple[TestReport, datetime] | None:
        """Return the last report of *model*'s test job and when it was made, or None."""
        for report, at in self._rows("SELECT report, tested_at FROM models WHERE id = ? AND report IS NOT NULL", (model,)):
            found = ledger_database.decode(report, TestReport)
            return (found, _parse_time(at)) if found else None
        return None

    def served(self, command: str) -> frozenset[str]:
        """Return the trees that a server's command line has served here (``test_facts``)."""
        return test_facts.served(self, command)

    # -- time --------------------------------------------------------------------------------------

    def follow_clock(self, records: Iterable[Record], reading: object) -> None:
        """Write *records* and the clock's *reading* (``store.clock``), all or nothing: their times were moved by what it says."""
        with self._transaction():
            for record in records:
                self.put(record)
            self.set_fact("clock", reading)

    def limit_times(self, now: datetime) -> None:
        """Let tests and verifications of a time after *now* count as of *now*; *now* was accepted by the trust rules."""
        late = [(model, passed) for model, passed in self.passed().items() if passed.at > now]
        for model, passed in late:
            self._write("UPDATE models SET passed = ? WHERE id = ?", (msgspec.json.encode(msgspec.structs.replace(passed, at=now)), model))
        text = units.rfc3339(now)
        if self._rows("SELECT 1 FROM blobs WHERE verified_at > ? LIMIT 1", (text,)):
            self._write("UPDATE blobs SET verified_at = ? WHERE verified_at > ?", (text, text))
        cold = self.fact(COLD_VERIFIED, dict[str, datetime]) or {}
        if any(at > now for at in cold.values()):
            self.set_fact(COLD_VERIFIED, {name: min(at, now) for name, at in cold.items()})

    # -- incidents and history ---------------------------------------------------------------------

    def log_incident(self, incident: Incident, at: datetime) -> None:
        """Log *incident*; one that repeats within a day is counted, and the oldest are deleted past ``MAX_INCIDENTS``."""
        key = tuple(printable(text, MAX_TEXT) for text in (incident.kind, incident.model, incident.blob, incident.source, incident.detail))
        with self._transaction():
            counted = f"{_INCIDENT_COUNTS}{incident.kind}"
            self.set_fact(counted, (self.fact(counted, int) or 0) + 1)  # a counter must not fall when old rows are deleted
            since = units.rfc3339(datetime.fromtimestamp(at.timestamp() - REPEAT_SECONDS, UTC))
            alike = "kind = ? AND model = ? AND blob = ? AND source = ? AND detail = ? AND last_at > ? AND last_at <= ?"
            same = self._rows(f"SELECT id FROM incidents WHERE {alike}", (*key, since, units.rfc3339(at)))  # noqa: S608  the clause stands right above
            if same:
                self._write("UPDATE incidents SET times = times + 1, last_at = ? WHERE id = ?", (units.rfc3339(at), same[0][0]))
                return
            row = (units.rfc3339(at), units.rfc3339(at), 1, *key)
            self._write("INSERT INTO incidents (at, last_at, times, kind, model, blob, source, detail) VALUES (?,?,?,?,?,?,?,?)", row)
            self._write("DELETE FROM incidents WHERE id <= (SELECT max(id) FROM incidents) - ?", (MAX_INCIDENTS,))

    def incidents(self, limit: int = MAX_INCIDENTS) -> tuple[LoggedIncident, ...]:
        """Return the newest *limit* incidents, the oldest of them first."""
        rows = self._rows(
            "SELECT id, at, last_at, times, kind, model, blob, source, detail FROM incidents ORDER BY id DESC LIMIT ?", (limit,)
        )
        return tuple(
            LoggedIncident(
                id=number, at=_parse_time(at), last_at=_parse_time(last), times=times, **dict(zip(_INCIDENT_FIELDS, what, strict=True))
            )
            for number, at, last, times, *what in reversed(rows)
        )

    def lying_sources(self, since: datetime) -> frozenset[tuple[str, str]]:
        """Return the pairs of a blob and a source that sent other bytes for it *since* an instant."""
        kinds = "kind IN ('hash-mismatch', 'size-mismatch') AND source != ''"
        rows = self._rows(f"SELECT DISTINCT blob, source FROM incidents WHERE {kinds} AND last_at >= ?", (units.rfc3339(since),))  # noqa: S608  the clause stands right above
        return frozenset((blob, source) for blob, source in rows)

    def incident_totals(self) -> dict[str, int]:
        """Return how many incidents were ever logged, by kind."""
        rows = self._rows("SELECT key, value FROM facts WHERE key >= ? AND key < ?", (_INCIDENT_COUNTS, f"{_INCIDENT_COUNTS}\x7f"))
        return {key.removeprefix(_INCIDENT_COUNTS): ledger_database.decode(value, int) or 0 for key, value in rows}

    def record_change(self, change: Change) -> None:
        """Add a set that was announced to the history; the oldest are deleted past ``MAX_HISTORY``."""
        row = (
            units.rfc3339(change.at), change.generation, change.actor, change.what, change.lock,
            msgspec.json.encode(change.added), msgspec.json.encode(change.removed),
        )  # fmt: skip
        with self._transaction():
            self._write("INSERT INTO history (at, generation, actor, what, lock, added, removed) VALUES (?,?,?,?,?,?,?)", row)
            self._write("DELETE FROM history WHERE id <= (SELECT max(id) FROM history) - ?", (MAX_HISTORY,))

    def history(self, limit: int = MAX_HISTORY) -> tuple[Change, ...]:
        """Return the newest *limit* changes, the oldest of them first."""
        rows = self._rows("SELECT at, generation, actor, what, lock, added, removed FROM history ORDER BY id DESC LIMIT ?", (limit,))
        return tuple(
            Change(
                at=_parse_time(at),
                generation=number,
                actor=actor,
                what=what,
                lock=lock,
                added=ledger_database.decode(added, tuple[str, ...]) or (),
                removed=ledger_database.decode(removed, tuple[str, ...]) or (),
            )
            for at, number, actor, what, lock, added, removed in reversed(rows)
        )

    # -- the database ------------------------------------------------------------------------------

    def _rows(self, query: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        if self._connection is None:
            return []
        with self._mutex:
            try:
                return self._connection.execute(query, tuple(values)).fetchall()
            except sqlite3.DatabaseError as error:
                raise ledger_database.store_error(error, self._path) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Make what is written inside one transaction: all or nothing, with one sync."""
        with self._mutex:
            self._write("BEGIN IMMEDIATE", ())
            try:
                yield
                self._write("COMMIT", ())
            except BaseException:
                if self._connection is not None and self._connection.in_transaction:
                    with contextlib.suppress(StoreError):  # why it was refused says more
                        self._write("ROLLBACK", ())
                raise

    def _write(self, statement: str, values: Iterable[Any]) -> None:
        if self._connection is None:
            raise StoreError("the ledger is not open for writing")
        with self._mutex:
            try:
                self._connection.execute(statement, tuple(values))
            except sqlite3.DatabaseError as error:
                raise ledger_database.store_error(error, self._path) from error


def _parse_time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
