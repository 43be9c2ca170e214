"""
Where a GPU's driver and CUDA's libraries are, for a test job: the sandbox clears the environment, and with it ``LD_LIBRARY_PATH``.

Rules that hold here:

1. The settings' ``library_path`` comes first, then the folders of this process's own ``LD_LIBRARY_PATH`` that hold such a library, then
   the usual places, then the Python packages ``nvidia-*``. A folder counts only if it holds a library of the driver or of CUDA.
2. Nothing is loaded to find it.
3. Folders outside of /usr are given to the sandbox to read; those in it are readable anyway. A container's mount in /usr is one of them.

The usual places: containers mount the driver at /usr/local/nvidia (NVIDIA's device plugin for Kubernetes on several clouds), the Windows
subsystem for Linux has it at /usr/lib/wsl/lib, NixOS at /run/opengl-driver/lib, Arch has CUDA in /opt/cuda.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

_USUAL = (
    "/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib/wsl/lib", "/run/opengl-driver/lib", "/usr/local/cuda/lib64",
    "/opt/cuda/lib64", "/opt/cuda/targets/x86_64-linux/lib",
)  # fmt: skip
_LIBRARY = re.compile(r"lib(cuda|cudart|cublas|cublasLt|nvidia-ml|nvidia-ptxjitcompiler|nvrtc)\.so(\.\d+)*")
#: What the driver itself is to every program: with it the loader is asked for CUDA, and with the other for what NVML tells.
DRIVER, MANAGEMENT = "libcuda.so.1", "libnvidia-ml.so.1"


def folders(named: tuple[str, ...] = (), *, variables: Mapping[str, str] = os.environ, usual: tuple[str, ...] = _USUAL) -> tuple[Path, ...]:
    """Return the folders that hold the driver's and CUDA's libraries, each once; *named* are those of the settings, whatever is in them."""
    inherited = [Path(text) for text in variables.get("LD_LIBRARY_PATH", "").split(os.pathsep) if text.startswith("/")]
    found = [folder for folder in (*inherited, *map(Path, usual), *_packages()) if _holds(folder)]
    return tuple(dict.fromkeys([*map(Path, named), *found]))


def find(name: str, places: tuple[Path, ...]) -> Path | None:
    """Return the library *name* in one of *places*, or None: then the loader may know another."""
    return next((folder / name for folder in places if (folder / name).exists()), None)


def _packages() -> Iterator[Path]:
    """Yield the folders of the Python packages nvidia-*: nvidia/cu13/lib, and before CUDA 13 one for each, as nvidia/cublas/lib."""
    for place in sys.path:
        parent = Path(place, "nvidia")
        try:
            with os.scandir(parent) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError:
            continue
        yield from (parent / name / "lib" for name in names)


def _holds(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(_LIBRARY.fullmatch(entry.name) for entry in entries)
    except OSError:
        return False
