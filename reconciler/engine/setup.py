"""``init``: settings written, the network's root pinned; ``trust init``: a lost floor begun anew, by a person's word."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from msgspec import Struct

from reconciler import trust
from reconciler.engine import confirm
from reconciler.errors import SettingsError, UsageError
from reconciler.settings import Settings
from reconciler.store import durable, floor, writer
from reconciler.store.ledger import Ledger
from reconciler.trust import Floor, TrustRoot

_TEMPLATE = """\
# reconcile: what this node holds and how. Every key has a default; an unknown one is an error.
# Relative paths are relative to this file.

[network]
snapshot = {snapshot}    # URL or path of the network's signed snapshot
root = "root.json"    # the pinned trust root
lockfile = "models.lock"

[store]
path = {store}
reserve = "1GiB"    # free space that is never used
grace = "24h"    # an unlisted model stops being active at once; its bytes go after this
"""


class Made(Struct, frozen=True, kw_only=True):
    """What ``init`` made."""

    config: str
    network: str | None
    fingerprint: str | None

    @property
    def sentence(self) -> str:
        """What was made and what comes next."""
        pinned = f"; pinned the root of {self.network}, fingerprint {self.fingerprint}" if self.network else ""
        after = "reconcile lock" if self.network else "put the network's root beside it as root.json, then reconcile lock"
        return f"wrote {self.config}{pinned}. Next: {after}"


def init(here: Path, *, root_file: Path | None, fingerprint: str, snapshot: str, store: str, force: bool) -> Made:
    """
    Write ``reconcile.toml`` in *here* and pin the root.

    Raises:
        UsageError: there are settings already.
        TrustError: the root is none, or not the one with *fingerprint*.
    """
    config = here / "reconcile.toml"
    if config.exists() and not force:
        raise UsageError(f"{config} is there already", hint="edit it, or replace it with --force")
    root = _pin(here, root_file, fingerprint) if root_file else None
    text = _TEMPLATE.format(snapshot=_quoted(snapshot or "snapshot.json"), store=_quoted(store))
    durable.write(config, text.encode())
    return Made(
        config=str(config), network=root[0].network if root else None, fingerprint=root[1] if root else None
    )


def _pin(here: Path, root_file: Path, fingerprint: str) -> tuple[TrustRoot, str]:
    try:
        envelope = confirm.read_capped(root_file)
    except OSError as error:
        raise SettingsError(f"{root_file} cannot be read: {error.strerror}") from None
    root = trust.pin(envelope, fingerprint)
    if (here / "root.json").absolute() != root_file.absolute():
        durable.write(here / "root.json", envelope)
    return root, trust.fingerprint_of(trust.payload_of(trust.decode_envelope(envelope)))


def _quoted(text: str) -> str:
    import tomli_w

    return tomli_w.dumps({"x": text}).removeprefix("x = ").strip()


def begin_floor(settings: Settings, now: datetime) -> Floor:
    """
    Begin the record of the newest snapshot anew, at the lock that is on disk; a person says that nobody replays an old one.

    Raises:
        TrustError: the lock is not the network's word.
    """
    layout = confirm.layout_of(settings)
    found = confirm.confirm(settings)
    found.admit(Floor(), now)
    durable.make_folder(layout.root)
    with writer.hold(layout.writer), Ledger.writing(layout.ledger) as ledger:
        made = trust.raised(Floor(), found.verified, now)
        floor.write(layout, ledger, made)
    return made
