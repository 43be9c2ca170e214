"""
Where everything in a store lies.

``blob`` and ``tree`` are the only two places in which a path is made from a digest, and both go through ``digest.parse``.
"""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import Struct

from reconciler.core import digest
from reconciler.core.errors import StoreError


class Layout(Struct, frozen=True):
    """The paths of a store at *root*, and of its cold storage."""

    root: Path
    cold: Path

    @property
    def active(self) -> Path:
        """The one link that is swapped."""
        return self.root / "active"

    @property
    def generations(self) -> Path:
        """Numbered folders of links."""
        return self.root / "generations"

    @property
    def blobs(self) -> Path:
        """Complete, verified bytes by digest; nothing else is ever here."""
        return self.root / "blobs"

    @property
    def trees(self) -> Path:
        """Models' folders by the digest of their listing."""
        return self.root / "trees"

    @property
    def staging(self) -> Path:
        """What has no name yet: downloads, trees in the making."""
        return self.root / "staging"

    @property
    def quarantine(self) -> Path:
        """What failed, kept to be looked at."""
        return self.root / "quarantine"

    @property
    def reports(self) -> Path:
        """Reports of bugs in this program."""
        return self.root / "reports"

    @property
    def trust(self) -> Path:
        """The floor, the walked roots, and every accepted envelope."""
        return self.root / "trust"

    @property
    def ledger(self) -> Path:
        """The database of what the file system cannot say."""
        return self.root / "ledger.db"

    @property
    def lock_file(self) -> Path:
        """The file whose lock the one writer holds. It is never deleted."""
        return self.root / ".lock"

    @property
    def space_reserve(self) -> Path:
        """A file that holds nothing but room, for a full disk."""
        return self.root / ".ballast"

    def blob(self, name: str) -> Path:
        """Return where the blob *name* lies."""
        return _path(self.blobs, name)

    def cold_blob(self, name: str) -> Path:
        """Return where the blob *name* lies in cold storage."""
        return _path(self.cold / "blobs", name)

    def tree(self, name: str) -> Path:
        """Return where the tree *name* lies."""
        return _path(self.trees, name)

    def tree_from_root(self, name: str) -> str:
        """Return the way from the store's root to the tree *name*."""
        return _digest_path("trees", name)

    @property
    def used(self) -> bool:
        """Whether this store has ever accepted a snapshot."""
        return self.active.is_symlink() or self.blobs.exists() or (self.trust / "snapshots").exists()

    def check(self, *, fan_out: bool = False) -> None:
        """
        Check that the own folders of the store, and of its cold storage, lie in them, and the *fan_out* of blobs and trees too.

        A link in the place of one (a slip, a backup that was restored, another process) would have the engine write and delete what is
        not the store's. The two roots may be reached through links. Who swaps a link in after this check is the store's own user, and
        needs no engine to delete what that user owns.

        Raises:
            StoreError: one of them is a link.
        """
        own = ("generations", "blobs", "trees", "staging", "quarantine", "reports", "trust", "trust/roots", "trust/snapshots", "cache")
        cold = f"{self.cold}/blobs"
        by_digest = [f"{kind}/{algorithm}" for kind in (self.blobs, self.trees, cold) for algorithm in digest.HEX_LENGTHS]
        found = [*(f"{self.root}/{name}" for name in own), cold, *by_digest]
        if fan_out:
            found += [path for folder in by_digest for path in _listed(folder)]
        for path in found:
            if os.path.islink(path):  # noqa: PTH114  text, as below
                raise StoreError(
                    f"{path} is a link, and the store writes and deletes in its own folders alone",
                    hint="put the folder that was there in its place, or move the link away and run `reconcile apply`",
                )


def _listed(folder: str) -> list[str]:
    try:
        return [f"{folder}/{name}" for name in os.listdir(folder)]  # noqa: PTH208  text, as everywhere where there are thousands
    except (FileNotFoundError, NotADirectoryError):
        return []


def _path(folder: Path, name: str) -> Path:
    return Path(_digest_path(str(folder), name))


def _digest_path(folder: str, name: str) -> str:
    """Return the path as text: a plan asks for thousands, and a ``Path`` takes ten times as long."""
    try:
        algorithm, digits = digest.parse(name)
    except ValueError as error:
        raise StoreError(str(error)) from None
    return f"{folder}/{algorithm}/{digits[:2]}/{digits}"
