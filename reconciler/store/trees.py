"""
Trees: a model's folder, named by the digest of its listing, made of links to blobs.

Rules that hold here:

1. A tree is complete when its name appears: made in staging, synced, renamed.
2. Its files are hard links to blobs, so versions that share files share bytes. An archive's members become blobs too.
3. The archive itself stays a blob, so a damaged member is unpacked again and not fetched again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec

from reconciler import files
from reconciler.core import digest as digests
from reconciler.core import snapshot
from reconciler.core.errors import StoreError, UnpackRefused
from reconciler.core.lock import LockedArtifact
from reconciler.core.state import TreeSeen
from reconciler.ports import Unpacker
from reconciler.store import atomic
from reconciler.store.blobs import Blobs
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger, Listing


class Trees:
    """The trees of one store, for its one writer."""

    def __init__(self, layout: Layout, ledger: Ledger, blobs: Blobs, unpacker: Unpacker) -> None:
        self._layout = layout
        self._ledger = ledger
        self._blobs = blobs
        self._unpacker = unpacker

    def assemble(self, recipe: str, artifacts: Sequence[LockedArtifact], entrypoint: str, *, standing: bool = False) -> TreeSeen:
        """
        Make the tree of *artifacts*, whose blobs are all there, and return it.

        *standing*: the tree was made before and its blobs are unchanged, so no archive needs to be unpacked for it.

        Raises:
            UnpackRefused: an archive breaks a rule, two members have one path, or *entrypoint* is not among the files.
            StoreError: the disk refused.
        """
        with files.translate_errors("make a model's tree"):
            listing = (self._ledger.listing(recipe) if standing else ()) or self._listing(artifacts)
            if entrypoint not in {entry.path for entry in listing}:
                raise UnpackRefused(f"the entrypoint {entrypoint!r} is not among the model's files")
            name = digest_of(listing)
            target = self._layout.tree(name)
            if target.is_dir() and not target.is_symlink():
                self._repair(target, listing)
            else:
                self._make(target, listing)
        total = sum(entry.size for entry in listing)
        seen = TreeSeen(digest=name, recipe=recipe, blobs=tuple(sorted({entry.digest for entry in listing})), bytes=total)
        self._ledger.record_tree(seen, listing)
        return seen

    def remove(self, name: str) -> None:
        """Delete the tree *name*; its blobs stay."""
        self._ledger.forget_trees([name])  # first: a half-deleted tree must not count as a missing one
        atomic.delete(self._layout.tree(name))

    def _listing(self, artifacts: Sequence[LockedArtifact]) -> tuple[Listing, ...]:
        found: dict[str, Listing] = {}
        folded: set[str] = set()
        for artifact in artifacts:
            for entry in self._members(artifact) if artifact.unpack else (self._file(artifact),):
                if entry.path.casefold() in folded:
                    raise UnpackRefused(f"two files of the model have the path {entry.path!r}")
                folded.add(entry.path.casefold())
                found[entry.path] = entry
        for path in found:
            if any(str(parent).casefold() in folded for parent in Path(path).parents):
                raise UnpackRefused(f"a part of the path {path!r} is both a file and a folder")
        return tuple(found[path] for path in sorted(found))

    def _file(self, artifact: LockedArtifact) -> Listing:
        _check_path(artifact.path)
        return Listing(path=artifact.path, digest=artifact.digest, size=self._layout.blob(artifact.digest).lstat().st_size)

    def _members(self, artifact: LockedArtifact) -> list[Listing]:
        """Unpack an archive into staging and make blobs of its members; of a refused archive nothing stays."""
        from reconciler.unpack import extract  # it imports the decompressors, which a plan does not need

        folder = self._layout.staging / f"unpack-{os.urandom(8).hex()}"
        atomic.make_folder(folder, 0o700)
        try:
            members = self._unpacker.unpack(self._layout.blob(artifact.digest), artifact.unpack or "", folder)
            extract.check_extracted(folder, members)
            return [self._member(folder, path) for path in members]
        finally:
            atomic.delete(folder)

    def _member(self, folder: Path, path: str) -> Listing:
        _check_path(path)
        name, size = self._blobs.add_file(folder / path)
        return Listing(path=path, digest=name, size=size)

    def _make(self, target: Path, listing: tuple[Listing, ...]) -> None:
        folder = self._layout.staging / f"tree-{os.urandom(8).hex()}"
        atomic.delete(target)  # what is there is no folder
        atomic.make_folder(folder, 0o755)
        try:
            for entry in listing:
                self._link(folder, entry)
            atomic.sync_tree(folder)
            atomic.make_folder(target.parent)
            atomic.rename(folder, target)
        finally:
            atomic.delete(folder)

    def _repair(self, target: Path, listing: tuple[Listing, ...]) -> None:
        """Replace each file that is not its blob, by one rename each: a reader sees the old file or the new one."""
        for entry in listing:
            if _through_link(target, entry.path) or not is_linked(target / entry.path, self._layout.blob(entry.digest)):
                self._link(target, entry)
        wanted = {entry.path for entry in listing}
        for found in files_of(target):
            if found not in wanted:
                atomic.delete(target / found)
        above = {target / parent for path in wanted for parent in Path(path).parents}
        for folder, _, _ in os.walk(target):
            if Path(folder) not in above:
                atomic.delete(Path(folder))
        atomic.sync_tree(target)

    def _link(self, folder: Path, entry: Listing) -> None:
        path = folder / entry.path
        for parent in reversed(path.relative_to(folder).parents[:-1]):
            at = folder / parent
            if at.is_symlink() or (at.exists() and not at.is_dir()):
                atomic.delete(at)
            atomic.make_folder(at)
        if path.is_dir() and not path.is_symlink():
            atomic.delete(path)
        atomic.link(self._layout.blob(entry.digest), path)


def _check_path(path: str) -> None:
    """Refuse a path that leads out of a tree, or that programs read differently."""
    try:
        snapshot.check_path(path)
    except ValueError as error:
        raise UnpackRefused(str(error)) from None


def _through_link(folder: Path, path: str) -> bool:
    """Whether a folder in *path* is a link: it may lead to the same files, but is not part of the tree."""
    return any((folder / above).is_symlink() for above in Path(path).parents[:-1])


def digest_of(listing: tuple[Listing, ...]) -> str:
    """Return the digest of a tree: the SHA-256 of its listing as JSON, sorted by path."""
    return digests.of(msgspec.json.encode(listing))


def is_linked(path: Path, blob: Path) -> bool:
    """Whether *path* is a hard link to the same file as *blob*."""
    try:
        found, wanted = path.lstat(), blob.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)


def files_of(folder: Path) -> tuple[str, ...]:
    """Return the paths of everything in *folder* that is no folder, sorted; links are named and not followed."""

    def refuse(error: OSError) -> None:
        raise StoreError(f"cannot read {folder}: {error}") from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        found += [str(Path(parent, name).relative_to(folder)) for name in (*names, *links)]
    return tuple(sorted(found))
