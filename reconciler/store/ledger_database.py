"""
The SQLite database of the ledger: its tables, and how it is opened for reading and for writing.

Rules that hold here:

1. The journal is a rollback journal and not WAL, because readers of a WAL write to its folder and a reader must leave no trace.
2. A transaction, and each statement outside one, is durable when it returns: ``synchronous=EXTRA`` also syncs the deletion of the
   journal, without which a power cut could undo a commit.
3. The database has a format number (``user_version``). An older one is brought to ``FORMAT`` in one transaction, whole or not at all: a
   crash leaves it as it was, and the next run does it again. A newer one is refused, by readers too, and not changed.
4. Each number stays what it is: what changes the tables is a new step at the end of ``STEPS``, never a change of one that is there. A step
   changes nothing where it was taken before: version 0.1 of the program sets the number back to 1.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from pathlib import Path
from typing import Any

import msgspec

from reconciler import files
from reconciler.core.errors import DiskFull, StoreError
from reconciler.store import store_format

_FIRST = """
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blobs (
  digest TEXT PRIMARY KEY, size INTEGER NOT NULL, inode INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, verified_at TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trees (recipe TEXT PRIMARY KEY, tree TEXT NOT NULL, listing BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS models (id TEXT PRIMARY KEY, record BLOB NOT NULL, passed BLOB, report BLOB, tested_at TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS incidents (
  id INTEGER PRIMARY KEY, at TEXT NOT NULL, last_at TEXT NOT NULL, times INTEGER NOT NULL,
  kind TEXT NOT NULL, model TEXT NOT NULL, blob TEXT NOT NULL, source TEXT NOT NULL, detail TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS history (
  id INTEGER PRIMARY KEY, at TEXT NOT NULL, generation INTEGER NOT NULL, actor TEXT NOT NULL, what TEXT NOT NULL, lock TEXT NOT NULL,
  added BLOB NOT NULL, removed BLOB NOT NULL
);
"""
#: What brings a database of format n to n + 1, at index n; 0 is an empty one. Version 0.1 of the program has 1.
STEPS: tuple[str, ...] = (_FIRST,)
FORMAT = len(STEPS)


def open_writable(path: Path) -> sqlite3.Connection:
    """
    Open the database at *path*, made if it is missing, and check it.

    Raises:
        StoreNewer: a newer version wrote it.
        sqlite3.OperationalError: the system refuses.
        sqlite3.DatabaseError: it is damaged, or is no database.
    """
    # Autocommit: each statement is a transaction of its own, durable when it returns.
    connection = sqlite3.connect(path, isolation_level=None, timeout=10, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA synchronous = EXTRA")  # FULL leaves the journal's deletion unsynced: a commit could be undone
        _migrate(connection, path)
        sound = connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except BaseException:
        connection.close()
        raise
    if not sound:
        connection.close()
        raise sqlite3.DatabaseError("its check failed")
    return connection


def insertion_of_blobs(count: int) -> str:
    """Return the statement that records *count* blobs in one transaction."""
    return "INSERT OR REPLACE INTO blobs VALUES " + ", ".join(["(?, ?, ?, ?, ?)"] * count)  # noqa: S608  only how many is variable


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the database to ``FORMAT`` in one transaction; raises StoreNewer."""
    found = _checked_format(connection, path)
    if found == FORMAT:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in STEPS[found:]:
            for statement in step.split(";"):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _checked_format(connection: sqlite3.Connection, path: Path) -> int:
    """Return the format number of the database; raises StoreNewer."""
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    store_format.check(found, FORMAT, f"the ledger {path}")
    return found


def is_not_empty(path: Path) -> bool:
    """Whether there is more at *path* than a run leaves that was killed while it made the database."""
    try:
        return path.lstat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def open_readable(path: Path, stack: contextlib.ExitStack) -> sqlite3.Connection | None:
    """
    Open the database at *path* for reading, without a trace; return None where it is missing or damaged.

    After a crash the journal beside it must be applied before anything is read, which only a writer may do. A reader then reads a copy
    to which it was applied, in a folder that *stack* deletes.
    """
    if not path.is_file():
        return None
    journal = path.with_name(f"{path.name}-journal")
    try:
        return _open_checked(path)
    except sqlite3.DatabaseError:
        if not journal.exists():
            return None
    import shutil  # as is tempfile, a hundredth of what a plan costs
    import tempfile

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reconcile-")))
    with contextlib.suppress(OSError, sqlite3.DatabaseError):
        for part in (path, journal):
            shutil.copyfile(part, folder / part.name)
        return _open_checked(folder / path.name, mode="rw")
    return None


def _open_checked(path: Path, mode: str = "ro") -> sqlite3.Connection:
    """Open an existing database, and read a row of each table; damage in the others is found by its writer."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=10, check_same_thread=False
    )
    try:
        _checked_format(connection, path)
        for table in ("facts", "blobs", "trees", "models", "incidents", "history"):
            connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchall()  # noqa: S608  the names stand right here
    except BaseException:
        connection.close()
        raise
    return connection


def store_error(error: sqlite3.Error, path: Path | None) -> StoreError:
    """
    Return what the database at *path* refused as an error of the store.

    SQLite has one text, "disk I/O error", for a used-up quota, a disk without inodes and more. Whether the system takes a small file
    beside the database says which it is.
    """
    if not isinstance(error, sqlite3.OperationalError):
        return StoreError(f"the ledger refused: {error}", hint="run `reconcile apply`: it puts a damaged ledger aside")
    if path is not None and (refused := files.refusal(path.parent)) is not None:
        return files.store_error(f"write the ledger ({error})", refused, path)
    kind = DiskFull if "full" in str(error) else StoreError
    return kind(f"the ledger refused: {error}")


def decode(value: bytes, kind: Any) -> Any:
    """Return *value* as *kind*, or None where it is damaged."""
    try:
        return _decoder(kind).decode(value)
    except (msgspec.DecodeError, TypeError):
        return None


@functools.cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    """Return the decoder of one *kind*, made once: to make it takes longer than to decode a row."""
    return msgspec.json.Decoder(kind)
