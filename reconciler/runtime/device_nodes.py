"""
Which device files a test job on a GPU is given, and which of those that it needs are missing or closed to it.

Rules that hold here:

1. Only what computing needs is given: of NVIDIA's files the control file, the unified memory's, one for each GPU, and the capabilities
   of MIG slices. A display's, a switch's and a profiler's files are not; nor is a display adapter any reason to give one.
2. A file that the driver needs and that is not there, or that this user may not open, is named, with what mends it. The sandbox has no
   more rights than this user, and a program that makes device files (``nvidia-modprobe``) cannot work in it.
3. AMD's files are given where there are any. Their GPUs are not among the node's: nothing here reads their memory (``devices``).
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from msgspec import Struct

#: NVIDIA's files, by what they are named in /dev and in its folder for capabilities.
_NVIDIA = re.compile(r"nvidiactl|nvidia-uvm|nvidia-uvm-tools|nvidia\d{1,4}")
_CAPABILITY = re.compile(r"nvidia-cap\d{1,6}")
_CAPABILITIES = "nvidia-caps"
#: What CUDA opens whatever it computes, with what makes it where it is missing.
_NEEDED = {"nvidiactl": "nvidia-modprobe", "nvidia-uvm": "nvidia-modprobe -u -c 0"}
#: The one device of the Windows subsystem for Linux, in place of all of NVIDIA's files.
_WSL = "dxg"


class DeviceNodes(Struct, frozen=True, kw_only=True):
    """What is given to a test job, and what it lacks."""

    given: tuple[Path, ...] = ()
    #: For people: one sentence for each file that is missing or closed.
    lacking: tuple[str, ...] = ()


def find(dev: Path = Path("/dev"), *, nvidia: bool, mig: bool = False) -> DeviceNodes:
    """
    Return the device files below *dev* for a node that has an *nvidia* GPU or none; with *mig*, its slices are used.

    Without a GPU that can compute nothing is given: a driver is a large attack surface, and with devices there is no limit on memory.
    """
    wsl = nvidia and (dev / _WSL).exists() and not (dev / "nvidiactl").exists()
    found = [dev / _WSL] if wsl else _nvidia(dev) if nvidia else []
    lacking = [] if wsl or not nvidia else _missing(dev, found, mig=mig)
    lacking += [why for path in found if (why := _closed(path))]
    amd = [dev / "kfd", dev / "dri"] if (dev / "kfd").exists() else []
    return DeviceNodes(given=tuple(sorted([*found, *amd])), lacking=tuple(lacking))


def _nvidia(dev: Path) -> list[Path]:
    names = _listed(dev)
    found = [dev / name for name in names if _NVIDIA.fullmatch(name)]
    capabilities = dev / _CAPABILITIES
    return found + [capabilities / name for name in _listed(capabilities) if _CAPABILITY.fullmatch(name)]


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _missing(dev: Path, found: list[Path], *, mig: bool) -> list[str]:
    names = {path.name for path in found}
    lacking = [f"{dev / name} is missing: run `{mend}` as root" for name, mend in _NEEDED.items() if name not in names]
    if not any(re.fullmatch(r"nvidia\d+", name) for name in names):
        lacking.append(f"{dev}/nvidia0 is missing, and every other GPU's file: run `nvidia-modprobe -c 0` as root")
    if mig and not any(path.parent.name == _CAPABILITIES for path in found):
        folder = dev / _CAPABILITIES
        lacking.append(f"{folder} has no file, and without one no MIG slice can be opened: run `nvidia-modprobe -f NAME` as root")
    return lacking


def _closed(path: Path) -> str:
    """Return why this user may not open *path*; empty where it may."""
    if path.parent.name == _CAPABILITIES:  # most are for administrators, and a slice's own are readable
        return ""
    try:
        seen = path.stat()
    except OSError as error:
        return f"{path} cannot be looked at: {error.strerror}"
    if os.access(path, os.R_OK | os.W_OK):
        return ""
    return f"{path} may not be opened by this user: its mode is {stat.S_IMODE(seen.st_mode):04o}, its group {_group(seen.st_gid)}"


def _group(number: int) -> str:
    import grp

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
