"""
Tells the network's operator how this node is: makes a signed status of it, queues it and sends what waits (``[report]``).

Rules that hold here:

1. It begins when a run is over and the store is released, and it changes nothing that a run reads.
2. Nothing that goes wrong here fails a run: it is a warning. A receiver that does not answer costs a command at most ``SEND_SECONDS``, and
   after a failure nothing is sent for a while; an agent sends in a thread of its own and does not wait for it at all.
3. What a status says of a node is what ``fleet.statement`` has fields for, and texts pass ``fleet.public_text``.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import socket
import stat
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from reconciler import __version__
from reconciler.commands import load_lock
from reconciler.commands import status as statuses
from reconciler.commands.context import NodeContext
from reconciler.core import digest
from reconciler.core.errors import PublishError, ReconcileError, SettingsError, StoreBusy
from reconciler.core.events import Notice
from reconciler.core.text import printable
from reconciler.ports import Reporter
from reconciler.store import writer_lock

if TYPE_CHECKING:
    from reconciler.commands.status import ModelStatus, Status
    from reconciler.core.lock import Lock
    from reconciler.fleet.statement import NodeReport, ReportedModel

#: How long a command may take longer because of a receiver that does not answer.
SEND_SECONDS = 3.0
#: How long an agent's thread may take.
AGENT_SECONDS = 60.0


@contextlib.contextmanager
def reported(context: NodeContext, report: Reporter, *, offline: bool = False) -> Iterator[None]:
    """Report the status that the run inside leaves, also where it ends with an error: that the network is refused must not stay unknown."""
    try:
        yield
    except Exception:
        report_status(context, report, offline=offline)
        raise
    report_status(context, report, offline=offline)


def report_status(context: NodeContext, report: Reporter, *, offline: bool = False, wait_seconds: float = SEND_SECONDS) -> None:
    """
    Queue a status where the node changed or an hour is over, and send what waits; raises nothing.

    *wait_seconds*: how long this call waits for the sending to end; 0: it goes on in a thread, for at most ``AGENT_SECONDS``. *offline*:
    nothing is sent to an address.
    """
    if not context.report_to:
        return
    try:
        _queue(context)
    except StoreBusy:  # another process is at it
        return
    except (ReconcileError, OSError) as error:
        hint = f"; {error.hint}" if isinstance(error, ReconcileError) else ""
        report(Notice(level="warning", text=f"no status was made for the network's operator: {printable(f'{error}{hint}', 400)}"))
        return
    if (offline and "://" in context.report_to) or any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    errors: list[str] = []
    sending = threading.Thread(target=_send, args=(context, wait_seconds or AGENT_SECONDS, errors), name=_THREAD, daemon=True)
    sending.start()
    if wait_seconds:
        sending.join(wait_seconds)
        if errors:
            report(Notice(level="warning", text=f"the status for the network's operator could not be sent: {errors[0]}; it is kept"))


_THREAD = "report"
#: The time of a status whose content is compared with that of another.
_NO_TIME = datetime.fromtimestamp(0, UTC)


@contextlib.contextmanager
def _held(context: NodeContext) -> Iterator[Any]:
    from reconciler.fleet.outbox import Outbox
    from reconciler.store import atomic

    atomic.make_folder(context.layout.outbox)
    outbox = Outbox(context.layout.outbox)
    with writer_lock.hold(outbox.lock_file):
        yield outbox


def _queue(context: NodeContext) -> None:
    from reconciler.fleet import statement

    private = read_key(context.report_key)
    found, lock = statuses.status(context), load_lock.load_verified_lock(context).lock
    made = _statement(context, found, lock, private)
    content = digest.of(statement.encode(msgspec.structs.replace(made, at=_NO_TIME, sequence=1)))
    now = context.clock()
    with _held(context) as outbox:
        outbox.add(content, lambda number: statement.sign(msgspec.structs.replace(made, at=now, sequence=number), private), now)


def _send(context: NodeContext, within_seconds: float, errors: list[str]) -> None:
    from reconciler.fleet import delivery

    try:
        with _held(context) as outbox:
            ended = delivery.deliver(
                outbox, context.report_to, context.node_id, context.download, context.clock(), within_seconds=within_seconds
            )
        if ended.error:
            errors.append(ended.error)
    except StoreBusy:
        return
    except (ReconcileError, OSError) as error:
        errors.append(printable(str(error), 300))


# -- the node's key --------------------------------------------------------------------------------


def read_key(path: Path | None) -> Any:
    """
    Return the node's private key.

    Raises:
        SettingsError: it is not there, is no key, or another user can read it.
    """
    from reconciler.publish import keys

    hint = "`reconcile key generate node --no-passphrase`, in the folder of the settings, makes node.key and node.pub"
    if path is None:
        raise SettingsError("[report] key: it is empty", hint=hint)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if os.fstat(fd).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise SettingsError(
                    f"[report] key: other users can read {path}", hint=f"`chmod 600 {shlex.quote(str(path))}` takes that right from them"
                )
            return keys.load_private(file.read(1 << 14), _no_passphrase)
    except OSError as error:
        raise SettingsError(f"[report] key: {path} cannot be read: {error.strerror}", hint=hint) from None
    except PublishError as error:
        raise SettingsError(f"[report] key: {path}: {error.message}", hint=hint) from None


def _no_passphrase() -> bytes:
    raise PublishError("it is encrypted, and there is nobody to ask for its passphrase")


# -- what is said ----------------------------------------------------------------------------------


def _statement(context: NodeContext, found: Status, lock: Lock, private: Any) -> NodeReport:
    from reconciler.fleet.statement import NodeReport, ReportedSnapshot
    from reconciler.publish import keys

    public, own = _public_words(lock), _own_words()
    return NodeReport(
        schema=1,
        network=found.network,
        node=context.node_id,
        key=keys.public_pem(private),
        sequence=1,
        at=_NO_TIME,
        program=__version__,
        snapshot=ReportedSnapshot(version=found.snapshot.version, digest=found.snapshot.digest),
        lock=found.lock,
        generation=found.generation,
        active_digest=found.active_digest,
        models=tuple(_model(model, public, own) for model in found.models),
        cohorts=context.cohorts,
        held=found.held,
        refused=(found.refused or "").partition(":")[0],
        unreachable_since=found.heard.unreachable.since if found.heard.unreachable else None,
    )


def _model(model: ModelStatus, public: frozenset[str], own: tuple[str, ...]) -> ReportedModel:
    from reconciler.fleet.public_text import public_text
    from reconciler.fleet.statement import ReportedModel

    word, _, more = model.reason.partition(": ")
    said = (model.last_error or "") if model.state == "failed" else more if word in {"incompatible", "source-failed", "held"} else ""
    return ReportedModel(
        id=model.id,
        state=model.state,
        reason=word[:64],
        tree=model.tree,
        since=model.since,
        attempts=model.attempts,
        detail=public_text(said, public=public, private=own),
    )


def _public_words(lock: Lock) -> frozenset[str]:
    """Return what the signed snapshot names, and everybody may know."""
    words = {model.id for model in lock.model} | {artifact.path for model in lock.model for artifact in model.artifact}
    hosts = {urlsplit(url).hostname or "" for blob in lock.blob.values() for url in blob.sources}
    return frozenset(words | hosts) - {""}


def _own_words() -> tuple[str, ...]:
    """Return the names of this machine and of its user."""
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    with contextlib.suppress(OSError, KeyError, ImportError):
        names.add(getpass.getuser())
    return tuple(sorted(names - {"", "localhost", "root"}))
