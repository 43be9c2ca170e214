"""
What a plan takes of the store's file system: bytes, and inodes, of which each file, folder and symbolic link takes one.

Bytes are counted from signed sizes. Inodes are counted as what is certain to be made; the members of an archive that was never unpacked
are unknown. A file system may run out of either while it has plenty of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct

from reconciler.core import units
from reconciler.core.lock import Lock, LockedModel
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.state import NodeState

#: Inodes that a run takes besides: folders of the store, temporary files, downloads under way.
_RUN_INODES = 32
#: What to do where a file system takes no more files, although it may have space.
INODES_HINT = "delete files there (`df -i` counts inodes), or put the store on a file system with more of them"


class Disk(Struct, frozen=True, kw_only=True):
    """What the plan needs of the store's file system, what is free, and what stays free whatever happens."""

    #: Bytes.
    needed: int
    free: int  #: Bytes.
    reserve: int  #: Bytes, from the settings.
    inodes_needed: int = 0  #: Files and folders that it makes.
    #: None where the file system does not count inodes, as btrfs.
    inodes_free: int | None = None

    @property
    def short(self) -> int:
        """Return the bytes that are missing, or 0."""
        return max(0, self.needed + self.reserve - self.free) if self.needed else 0

    @property
    def inodes_short(self) -> int:
        """Return the inodes that are missing, or 0."""
        return max(0, self.inodes_needed - self.inodes_free) if self.inodes_free is not None else 0

    @property
    def shortage(self) -> str:
        """Return what is missing, as one sentence; empty where nothing is."""
        if self.short:
            return (
                f"not enough space: {units.human_size(self.needed)} needed, {units.human_size(self.free)} free, "
                f"{units.human_size(self.reserve)} of it kept in reserve: {units.human_size(self.short)} short"
            )
        if self.inodes_short:
            return (
                f"not enough inodes: {self.inodes_needed:,} needed for files and folders, {self.inodes_free:,} free on the store's "
                f"file system: {self.inodes_short:,} short"
            )
        return ""


def need(lock: Lock, state: NodeState, node: NodeFacts, policy: Policy, installed: set[str], arriving: dict[str, int]) -> Disk:
    """
    Return what is needed for the models *installed*, by id, and for the blobs *arriving* in the store, with their sizes in bytes.

    An archive that was not unpacked yet counts twice: its members take about as many bytes as itself.
    """
    models = [model for model in lock.model if model.id in installed]
    unmade = [model for model in models if model.recipe not in state.trees]
    unpacked = {artifact.digest for model in unmade for artifact in model.artifact if artifact.unpack}
    needed = sum(arriving.values()) + sum(lock.blob[name].size for name in unpacked)
    return Disk(
        needed=needed,
        free=node.disk_free_bytes,
        reserve=policy.reserve_bytes,
        inodes_needed=_inodes(state, models, unmade, arriving),
        inodes_free=node.disk_free_inodes if node.disk_total_inodes else None,
    )


def _inodes(state: NodeState, models: list[LockedModel], unmade: list[LockedModel], arriving: Iterable[str]) -> int:
    blobs = [*arriving]
    if not (models or blobs):
        return 0
    prefixes = {_prefix(name) for name in blobs} - {_prefix(name) for name in state.blobs}
    trees = sum(3 + len({*_folders(model)}) for model in unmade)  # the tree, and perhaps the two folders that it lies in
    ids = {*state.active.entries, *(model.id for model in models)}
    generation = 3 + len(ids) + len({model.partition(":")[0] for model in ids})  # a link for each model, a folder for each name
    return len(blobs) + len(prefixes) + trees + generation + _RUN_INODES


def _prefix(name: str) -> str:
    """Return the folder that the blob *name* lies in: its algorithm and two digits."""
    algorithm, _, digits = name.partition(":")
    return f"{algorithm}/{digits[:2]}"


def _folders(model: LockedModel) -> Iterator[str]:
    """Yield the folders in the tree of *model*, but for those of an archive's members."""
    for artifact in model.artifact:
        parts = artifact.path.split("/")[:-1]
        yield from ("/".join(parts[: end + 1]) for end in range(len(parts)))
