"""What this node is, measured once a run."""

from __future__ import annotations

import os
from pathlib import Path

from reconciler.core.node import NodeFacts
from reconciler.settings import Settings


def measure_node(settings: Settings) -> NodeFacts:
    """Return the facts of this machine; a missing driver or engine is a fact, not an error."""
    from reconciler.runtime import devices, engines

    gpus = devices.gpus()
    disk = os.statvfs(_existing(settings.store_path))
    return NodeFacts(
        gpus=gpus,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_total_bytes=disk.f_blocks * disk.f_frsize,
        disk_free_bytes=disk.f_bavail * disk.f_frsize,
        engines=engines.installed(settings.runtime),
        device=devices.device_label(gpus),
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
