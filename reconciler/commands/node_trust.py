"""
What this node trusts: the pinned root, the roots that replaced it, and the newest snapshot that the node accepted.

Rules that hold here:

1. Newer roots are applied in order, one version at a time. Each must be signed by its predecessor and by itself, and is written,
   durably, before the next is looked at (TUF specification, 5.3).
2. The trust state is written, durably, before anything that a snapshot causes.
3. A refused document is logged as an incident, and stays refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime

from msgspec import Struct

from reconciler.commands import documents
from reconciler.commands.context import NodeContext
from reconciler.commands.documents import Kept
from reconciler.core import trust
from reconciler.core.errors import FetchError, SettingsError, TrustError
from reconciler.core.events import Incident
from reconciler.core.trust import TrustRoot, TrustState, Verified
from reconciler.store import trust_state
from reconciler.store.ledger import Ledger

# -- roots -----------------------------------------------------------------------------------------


class RootFiles(Struct, frozen=True, kw_only=True):
    """The envelopes that the trusted root follows from: the pinned one, then those applied after it, in order."""

    pinned: bytes
    newer: tuple[bytes, ...]


def read_roots(context: NodeContext) -> RootFiles:
    """
    Return the envelopes of all roots of this node.

    Raises:
        SettingsError: no root is pinned, or it cannot be read.
    """
    path = context.root_path
    try:
        pinned = documents.read_capped(path, context.limits.root_bytes)
    except FileNotFoundError:
        hint = f"get root.json from the network's operator and put it there; `reconcile root inspect {path.name}` shows its fingerprint"
        raise SettingsError(f"there is no trust root yet: {path}", hint=hint) from None
    except OSError as error:
        raise SettingsError(f"the trust root {path} cannot be read: {error.strerror}", hint=documents.NOT_READABLE_HINT) from None
    return RootFiles(pinned=pinned, newer=trust_state.roots(context.layout))


def trusted_root(context: NodeContext, roots: RootFiles | None = None) -> TrustRoot:
    """
    Return the root that is trusted now: the last of *roots*, else of those that are read.

    Raises:
        SettingsError: no root is pinned.
        TrustError: the pinned root is not valid, or one does not follow from the one before it.
    """
    roots = roots or read_roots(context)
    with documents.named(str(context.root_path), documents.BAD_ROOT_HINT, roots.pinned):
        pinned = trust.pin(roots.pinned, context.root_fingerprint, limits=context.limits)
    return trust.apply_root_chain(pinned, roots.newer, limits=context.limits)


#: A fact of the ledger: when newer roots were last asked for, and at which address.
_ASKED = "roots-asked"
#: How long a node that asks by itself waits before it asks again, unless a signature gives it a reason.
ROOTS_EVERY_SECONDS = 3600.0


class _Asked(Struct, frozen=True, kw_only=True):
    at: datetime
    address: str


def fetch_newer_roots(context: NodeContext, ledger: Ledger, root: TrustRoot, *, every_seconds: float = 0.0, kept: Kept = None) -> TrustRoot:
    """
    Fetch roots newer than *root* from where the settings say, one version at a time, until there is none; return the one trusted then.

    Where they were asked for in the last *every_seconds*, they are not asked for again: ten thousand nodes would ask each few minutes for
    what changes once a year.
    """
    now, asked = context.clock(), ledger.fact(_ASKED, _Asked)
    if asked and asked.address == context.root_updates and 0 <= (now - asked.at).total_seconds() < every_seconds:
        return root
    if context.root_updates:
        ledger.set_fact(_ASKED, _Asked(at=now, address=context.root_updates))
    for _ in range(context.limits.root_rotations if context.root_updates else 0):
        try:
            newer = _apply(context, root, (context.root_updates.replace("{version}", str(root.version + 1)),), kept)
        except (FetchError, SettingsError):
            break
        if newer.version == root.version:  # the same document under each number
            break
        root = newer
    return root


def apply_roots(context: NodeContext, sources: tuple[str, ...], ledger: Ledger) -> TrustRoot:
    """
    Apply the roots at *sources*, URLs or paths, by their versions; return the root that is trusted then.

    Raises:
        TrustError: one does not follow from the one before it; those before it stay applied.
    """
    del ledger  # whoever has one holds the store
    return _apply(context, trusted_root(context), sources)


def _apply(context: NodeContext, trusted: TrustRoot, sources: tuple[str, ...], kept: Kept = None) -> TrustRoot:
    cap = context.limits.root_bytes
    fetched = [(source, documents.fetch(source, context.download, cap=cap, kept=kept).data or b"") for source in sources]
    return apply_root_envelopes(context, trusted, fetched)


def apply_root_envelopes(context: NodeContext, trusted: TrustRoot, envelopes: Sequence[tuple[str, bytes]]) -> TrustRoot:
    """Apply the roots of *envelopes*, each with the place that it came from, after *trusted*; raises as ``apply_roots``."""
    found = []
    for source, envelope in envelopes:
        with documents.named(source, data=envelope):
            found.append((trust.root_version(envelope), source, envelope))
    for version, source, envelope in sorted(found):
        if version > trusted.version:
            with documents.named(source):
                trusted = trust.advance(trusted, envelope, limits=context.limits)
            trust_state.keep_root(context.layout, trusted.version, envelope)
    return trusted


# -- the newest accepted snapshot ------------------------------------------------------------------


def read_trust_state(context: NodeContext) -> TrustState:
    """Return the record of the newest accepted snapshot, without a trace; raises TrustStateLost."""
    with Ledger.reading(context.layout.ledger) as ledger:
        return trust_state.read(context.layout, ledger)


def record_accepted(context: NodeContext, verified: Verified, root: TrustRoot, ledger: Ledger, now: datetime) -> None:
    """
    Check *verified* against the time and the trust state, and advance the trust state to it, durably, before anything is done with it.

    Raises:
        TrustError: it may not be used now.
    """
    before = trust_state.read(context.layout, ledger)
    trust.check_fresh(verified, root, now=now, trust_state=before, limits=context.limits)
    after = trust.advance_state(before, verified)
    if trust_state.in_file(context.layout) != after or ledger.trust_state() != after:
        trust_state.write(context.layout, ledger, after)


@contextlib.contextmanager
def refusals_logged(ledger: Ledger, now: datetime, source: str = "") -> Iterator[None]:
    """Log a document that is refused as an incident, and raise the refusal again."""
    try:
        yield
    except TrustError as error:
        ledger.log_incident(Incident(kind=error.name, detail=error.message, source=source), now)
        raise
