"""``init`` writes the settings and pins the network's root; ``trust init`` starts a new trust state after a person's consent."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct, structs

from reconciler import files, settings_file
from reconciler.commands import documents, load_lock
from reconciler.commands.context import NodeContext, hold_store
from reconciler.core import dsse, trust, units
from reconciler.core.errors import SettingsError, TrustStateLost, UntrustedFile, UsageError
from reconciler.core.node import Limits
from reconciler.core.trust import TrustRoot, TrustState
from reconciler.store import atomic, trust_state

_TEMPLATE = """\
# Settings of reconcile on this node. Every key has a default; an unknown key is an error.
# Relative paths are relative to this file.

[network]
snapshot = {snapshot}    # URL or path of the network's signed snapshot
root = "root.json"    # the pinned trust root
root_updates = {root_updates}    # where newer trust roots are looked for, one version after the other
lockfile = "models.lock"

[node]
id = {node}    # a random id, from which the node's place in rollouts follows
cohorts = []    # groups of nodes that rollouts may name, e.g. "canary"

[store]
path = {store}
reserve = "1GiB"    # free space that is never used
grace = "24h"    # an unlisted model stops serving at once; its files are deleted after this time

[report]
to = ""    # a folder or an https address that receives signed statuses of this node, for the network's operator
key = "node.key"    # the private key that signs them; give node.pub to the operator
"""


class InitResult(Struct, frozen=True, kw_only=True):
    """What ``init`` made."""

    config: str
    network: str | None
    fingerprint: str | None
    snapshot: str = ""
    #: Where newer roots are looked for.
    root_updates: str = ""
    #: Why other commands find these settings only if they are named; empty: they find them.
    warning: str = ""

    @property
    def sentence(self) -> str:
        """What was made and what comes next."""
        pinned = f"; pinned the root of {self.network}, fingerprint {self.fingerprint}" if self.network else ""
        missing = [] if self.network else ["put the network's root beside it as root.json"]
        missing += [] if self.snapshot else ["name the network's snapshot in it, by its URL or file"]
        lock = f"reconcile lock --config {self.config} ({self.warning})" if self.warning else "reconcile lock"
        return f"wrote {self.config}{pinned}. Next: {'; '.join([*missing, lock])}"


def init(
    here: Path,
    *,
    root_file: Path | None = None,
    root_envelope: bytes | None = None,
    fingerprint: str = "",
    snapshot: str = "",
    root_updates: str = "",
    store: str = "store",
    force: bool = False,
) -> InitResult:
    """
    Write ``reconcile.toml`` in *here* and pin the root: the file *root_file*, or the bytes *root_envelope*, which came from elsewhere.

    Newer roots are looked for beside the snapshot, unless *root_updates* says where.

    Raises:
        UsageError: there are settings already, or *snapshot* is an address of a kind that nothing is fetched from.
        SettingsError: what is given would be refused by every command that reads the settings.
        TrustError: the root is none, or not the one with *fingerprint*.
    """
    from reconciler.fetch import http  # TLS comes with it

    config = here / "reconcile.toml"
    if config.exists() and not force:
        raise UsageError(f"{config} is there already", hint="edit it, or replace it with --force")
    http.is_url(snapshot)
    updates = root_updates or beside(snapshot or "snapshot.json")
    place, node = _quoted(snapshot or "snapshot.json"), _quoted(_node_id(config))
    text = _TEMPLATE.format(snapshot=place, root_updates=_quoted(updates), node=node, store=_quoted(store))
    settings_file.decode(text.encode(), here, str(config))
    envelope = _read_root(root_file) if root_file else root_envelope
    root = inspect_root(envelope, str(root_file or "the root"), fingerprint) if envelope is not None else None
    if root_file is None or (here / "root.json").absolute() != root_file.absolute():
        _write_root(here, envelope)
    _add_lines(here / ".gitattributes", _ATTRIBUTES)
    _add_lines(here / ".gitignore", _ignored(here, store))
    _make_key(here)
    atomic.write(atomic.target_of(config), text.encode())
    return InitResult(
        config=str(config),
        network=root[0].network if root else None,
        fingerprint=root[1] if root else None,
        snapshot=snapshot,
        root_updates=updates,
        warning=_why_not_found(config),
    )


def _node_id(config: Path) -> str:
    """Return the node's name in the settings at *config*, which are replaced, or a new one; never the host's name, which says too much."""
    with contextlib.suppress(OSError, SettingsError):
        if known := settings_file.decode(config.read_bytes(), config.parent).node.id:
            return known
    return str(uuid.uuid4())


def _why_not_found(config: Path) -> str:
    try:
        files.check_trusted_path(config, os.geteuid())
    except UntrustedFile as error:
        return f"without --config it is not used: {error.message}"
    return ""


def beside(snapshot: str) -> str:
    """Return where newer roots are by the naming rule of The Update Framework: ``2.root.json``, ``3.root.json`` beside the snapshot."""
    place = urlsplit(snapshot)
    folder = place.path.rpartition("/")[0]
    name = "{version}.root.json"
    if "://" in snapshot:
        return f"{place.scheme}://{place.netloc}{folder}/{name}"
    return str(Path(snapshot).with_name(name)) if snapshot else ""


#: What git must not do to the committed files: convert the line ends of signed bytes, or merge two versions of a generated file.
_ATTRIBUTES = {
    b"models.lock": b"text eol=lf linguist-generated merge=binary",
    b"snapshot.json": b"-text linguist-generated merge=binary",
    b"root.json": b"-text linguist-generated merge=binary",
}


def _make_key(here: Path) -> None:
    """Make the node's key, with its public half beside it; a key that is there stays, since the operator knows it."""
    from reconciler.publish import keys

    private, public = here / "node.key", here / "node.pub"
    if os.path.lexists(private):
        return
    pair = keys.generate()
    atomic.create(private, pair.private_pem, 0o600)
    atomic.write(public, pair.public_pem.encode())


def _ignored(here: Path, store: str) -> dict[bytes, bytes]:
    """Return what git ignores: the node's key, and the store, if it lies in *here*."""
    place = Path(os.path.normpath(here / Path(store).expanduser()))
    inside = place.is_relative_to(here) and place != here
    return {b"/node.key": b""} | ({f"/{place.relative_to(here).as_posix()}/".encode(): b""} if inside else {})


def _add_lines(path: Path, lines: dict[bytes, bytes]) -> None:
    """Add to git's file at *path* a line for each pattern that it has none for; git reads no link, and neither does this."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return
    data = path.read_bytes() if path.exists() else b""
    patterns = {line.split()[0].strip(b"/") for line in data.splitlines() if line.strip()}
    missing = [b"%s %s" % line if line[1] else line[0] for line in lines.items() if line[0].strip(b"/") not in patterns]
    if missing:
        start = data + (b"\n" if data and not data.endswith(b"\n") else b"")
        atomic.write(path, start + b"".join(line + b"\n" for line in missing))


def _read_root(root_file: Path) -> bytes:
    try:
        return documents.read_capped(root_file, Limits().root_bytes)
    except OSError as error:
        hint = "get the root from the network's operator, and name the file with --root FILE"
        raise SettingsError(f"{root_file} cannot be read: {error.strerror}", hint=hint) from None


def inspect_root(envelope: bytes, place: str, fingerprint: str = "") -> tuple[TrustRoot, str]:
    """
    Return the root in *envelope*, which came from *place*, and its fingerprint.

    Raises:
        TrustError: it is no root, or not the one with *fingerprint*.
    """
    with documents.named(place, documents.BAD_ROOT_HINT, envelope):
        root = trust.pin(envelope, fingerprint)
    return root, trust.fingerprint_of(dsse.payload_of(dsse.decode(envelope)))


def _write_root(here: Path, envelope: bytes | None) -> None:
    if envelope is not None:
        atomic.write(atomic.target_of(here / "root.json"), envelope)


def _quoted(text: str) -> str:
    import tomli_w

    return tomli_w.dumps({"x": text}).removeprefix("x = ").strip()


# -- trust init ------------------------------------------------------------------------------------


def describe_anchor(context: NodeContext) -> tuple[str, str]:
    """Return what a new trust state would start at, as sentences for the person who decides: the root, and the lock."""
    files = load_lock.read_files(context)
    found = load_lock.verify_files(context, files)
    pinned = trust.fingerprint_of(dsse.payload_of(dsse.decode(files.roots.pinned)))
    at = found.lock.snapshot
    return (
        f"root {found.root.version} of {found.root.network}; fingerprint of the pinned one: {pinned}",
        f"models.lock: snapshot {at.version}, issued at {units.rfc3339(at.issued_at)}",
    )


def reset_trust_state(context: NodeContext) -> TrustState:
    """
    Start a new trust state at the committed lock, and return it; a person says that nobody replays an old snapshot.

    Where the old trust state is whole it stays, except for a time of issue that lies in the future (a snapshot was signed so, and accepted
    while the clock was ahead): that is forgotten, and the version is not.

    Raises:
        TrustError: the lock is not one that the network signed, or older than the trust state says.
    """
    found = load_lock.load_verified_lock(context)
    with hold_store(context) as ledger:
        now = context.clock()
        try:
            known = trust_state.read(context.layout, ledger)
            if known.issued_at and known.issued_at > now:
                known = structs.replace(known, issued_at=None)
        except TrustStateLost:
            known = TrustState()
        found.check_fresh(known, now=now, limits=context.limits)
        made = trust.advance_state(known, found.verified)
        trust_state.write(context.layout, ledger, made)
    return made
