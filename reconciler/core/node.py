"""
What a node is, and what it permits.

Facts are measured once a run and given as a value; a policy comes from the settings. Units are in the names.
"""

from __future__ import annotations

from msgspec import Struct

from reconciler.core import units


class Gpu(Struct, frozen=True, kw_only=True):
    """One GPU, as its driver names it."""

    name: str  #: As its driver names it.
    total_bytes: int  #: Its memory.
    free_bytes: int  #: Free memory.
    driver: str = ""  #: The driver's version.
    index: int = -1  #: Its number among the node's, in the order of the PCI bus; -1: not known, as in a profile.
    uuid: str = ""  #: Its name to CUDA: ``GPU-…``, or ``MIG-…`` for a slice of one.

    @property
    def device(self) -> str:
        """What a model that ran on it is said to have run on."""
        return f"cuda:{self.index}, {self.name}" if self.index >= 0 else self.name


class NodeFacts(Struct, frozen=True, kw_only=True):
    """What this machine has, measured at the start of a run."""

    gpus: tuple[Gpu, ...] = ()  #: Its GPUs.
    memory_bytes: int = 0  #: Main memory.
    disk_total_bytes: int = 0  #: Size of the store's file system.
    disk_free_bytes: int = 0  #: Free space on it.
    #: 0: the file system does not count inodes, as btrfs.
    disk_total_inodes: int = 0
    disk_free_inodes: int = 0  #: Free inodes on it.
    #: Installed engines by name, with their versions: ``{"llama-cpp": "0.3.36"}``.
    engines: dict[str, str] = {}
    #: What test jobs run on: the GPUs' names and driver, or ``cpu``. A change of it calls for new tests.
    device: str = "cpu"
    #: Whether one model may be split over several GPUs, as the settings permit.
    split: bool = False

    @property
    def gpu_bytes(self) -> int:
        """Memory that one model may have: the largest GPU's, or that of all where a model may be split over them; 0 without one."""
        sizes = [gpu.total_bytes for gpu in self.gpus]
        return sum(sizes) if self.split else max(sizes, default=0)

    @property
    def gpu_bytes_in_words(self) -> str:
        """What ``gpu_bytes`` is, after "of GPU memory," in a sentence."""
        if self.split and len(self.gpus) > 1:
            return f"the {len(self.gpus)} GPUs together have {units.human_size(self.gpu_bytes)}"
        return f"the largest GPU has {units.human_size(self.gpu_bytes)}"


class Policy(Struct, frozen=True, kw_only=True):
    """What the node's operator permits, beside what the network wants."""

    #: Free space that is never used.
    reserve_bytes: int = 1 << 30
    #: How long the bytes of an unlisted model stay.
    grace_seconds: float = 86400.0
    generations: int = 10
    quarantine_bytes: int = 10 << 30
    #: Every blob is hashed at least this often.
    scrub_seconds: float = 30 * 86400.0
    #: URL templates of the operator's own mirrors, tried after the lock's sources where the network allows it.
    fallback: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


class Limits(Struct, frozen=True, kw_only=True):
    """Every cap in one place; what is past one is refused, never cut."""

    envelope_bytes: int = 16 << 20
    #: A root is decoded before any key of it is trusted, so its envelope is kept small: 128 keys take a tenth of this.
    root_bytes: int = 512 << 10
    signatures: int = 64
    clock_skew_seconds: float = 300.0
    #: How far the clock may stand behind the time of issue of the newest accepted snapshot.
    clock_back_seconds: float = 300.0
    root_rotations: int = 256
    archive_members: int = 100_000
    #: Unpacked bytes of one archive, as a multiple of its own size ...
    archive_ratio: int = 200
    #: ... and in all.
    archive_bytes: int = 2 << 40
    archive_depth: int = 16
