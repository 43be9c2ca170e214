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
        """The symbolic link to the active generation; a swap replaces it."""
        return self.root / "active"

    @property
    def generations(self) -> Path:
        """Numbered folders of links."""
        return self.root / "generations"

    @property
    def blobs(self) -> Path:
        """Complete, verified files, each under its digest; nothing else belongs here."""
        return self.root / "blobs"

    @property
    def trees(self) -> Path:
        """Models' folders, each under the digest of its listing."""
        return self.root / "trees"

    @property
    def staging(self) -> Path:
        """Unfinished work: downloads, archives that are unpacked, trees that are made."""
        return self.root / "staging"

    @property
    def quarantine(self) -> Path:
        """Records and files of models that failed, kept for people to examine."""
        return self.root / "quarantine"

    @property
    def reports(self) -> Path:
        """Reports of bugs in this program."""
        return self.root / "reports"

    @property
    def outbox(self) -> Path:
        """Signed statuses that are to be sent to the network's operator."""
        return self.root / "outbox"

    @property
    def trust(self) -> Path:
        """The trust state, the accepted roots, and the accepted snapshots' envelopes."""
        return self.root / "trust"

    @property
    def ledger(self) -> Path:
        """The database of what the file system cannot record."""
        return self.root / "ledger.db"

    @property
    def serving(self) -> Path:
        """Which generation each server of this node was last told of."""
        return self.root / "serving.json"

    @property
    def format_file(self) -> Path:
        """The number of the format in which everything here is written."""
        return self.root / "format"

    @property
    def lock_file(self) -> Path:
        """The file whose lock the store's one writer holds. It is never deleted."""
        return self.root / ".lock"

    @property
    def space_reserve(self) -> Path:
        """A file without data whose space is given back when the disk is full."""
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
        """Return the path of the tree *name*, relative to the store's root."""
        return _digest_path("trees", name)

    @property
    def used(self) -> bool:
        """Whether this store has ever accepted a snapshot."""
        return self.active.is_symlink() or self.blobs.exists() or (self.trust / "snapshots").exists()

    def check(self, *, fan_out: bool = False) -> None:
        """
        Check that no folder of the store or of cold storage is a link; with *fan_out*, the two-digit folders of blobs and trees too.

        Through a link in the place of one (made by mistake, by a restored backup, by another process), the program would write and delete
        files outside the store. The two roots themselves may be reached through links. Whoever puts a link there after this check is the
        store's own user, who can delete those files anyway.

        Raises:
            StoreError: one of them is a link.
        """
        own = (
            "generations",
            "blobs",
            "trees",
            "staging",
            "quarantine",
            "reports",
            "outbox",
            "trust",
            "trust/roots",
            "trust/snapshots",
            "cache",
        )
        cold = f"{self.cold}/blobs"
        by_digest = [f"{kind}/{algorithm}" for kind in (self.blobs, self.trees, cold) for algorithm in digest.HEX_LENGTHS]
        found = [*(f"{self.root}/{name}" for name in own), cold, *by_digest]
        if fan_out:
            found += [path for folder in by_digest for path in _listed(folder)]
        for path in found:
            if os.path.islink(path):  # noqa: PTH114  text, as below
                raise StoreError(
                    f"{path} is a link, and the store writes and deletes only in its own folders",
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
