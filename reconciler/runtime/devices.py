"""GPUs, as their driver names them. A missing driver is a fact: no GPU."""

from __future__ import annotations

import contextlib
from pathlib import Path

from reconciler.core.node import Gpu

#: What NVIDIA's driver shows of itself, on Linux and in its subsystem on Windows.
_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")


def gpus() -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs of this machine; quick and silent where there is no driver."""
    if not _has_driver():
        return ()
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        return tuple(_gpu(pynvml, index, driver) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _has_driver() -> bool:
    """Look for the driver, and then its library, before the binding is loaded: a plan on a machine without one pays nothing."""
    if not any(Path(place).exists() for place in _DRIVERS):
        return False
    import ctypes

    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _gpu(pynvml, index: int, driver: str) -> Gpu:  # type: ignore[no-untyped-def]  # noqa: ANN001  a module without types
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name = pynvml.nvmlDeviceGetName(handle)
    return Gpu(name=str(name), total_bytes=int(memory.total), free_bytes=int(memory.free), driver=driver)


def device_label(found: tuple[Gpu, ...]) -> str:
    """Return what test jobs run on: a change of it calls for new tests."""
    if not found:
        return "cpu"
    names = ", ".join(sorted({gpu.name for gpu in found}))
    return f"{len(found)} x {names}, driver {found[0].driver}"


def nodes(found: tuple[Gpu, ...]) -> tuple[Path, ...]:
    """
    Return the device files that a test job on a GPU needs; none where there is no GPU that computes.

    A display alone does not count: its driver is a large door, and with devices no limit on memory holds.
    """
    dev = Path("/dev")
    nvidia = [path for path in dev.glob("nvidia*") if path.name != "nvidia-modeset"] if found else []
    amd = [dev / "kfd", dev / "dri"] if (dev / "kfd").exists() else []
    return tuple(sorted([*nvidia, *amd]))


def free_memory() -> int:
    """Return bytes of main memory that could be had now."""
    import psutil

    return int(psutil.virtual_memory().available)
