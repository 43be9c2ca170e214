"""What this node is, measured once a run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from reconciler.node import NodeFacts
from reconciler.settings import Settings


def measure(settings: Settings) -> NodeFacts:
    """Return the facts of this machine; a missing driver or engine is a fact, not an error."""
    from reconciler.runtime import devices, engines

    gpus = devices.gpus()
    usage = shutil.disk_usage(_existing(settings.store_path))
    return NodeFacts(
        gpus=gpus,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_total_bytes=usage.total,
        disk_free_bytes=usage.free,
        engines=engines.installed(settings),
        device=devices.device_label(gpus),
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
