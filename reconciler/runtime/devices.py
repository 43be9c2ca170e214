"""GPUs, as their driver reports them. Without a driver there is no GPU, and that is no error."""

from __future__ import annotations

import contextlib
from pathlib import Path

from reconciler.core.node import Gpu

#: Files of NVIDIA's driver, on Linux and in the Windows subsystem for Linux.
_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")


def gpus() -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs of this machine; none, without delay, where there is no driver."""
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
    """Look for the driver and its library before the binding is imported, which would slow down each plan on machines without one."""
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
    """Return the device that test jobs run on, as one line of text; models are tested again when it changes."""
    if not found:
        return "cpu"
    names = ", ".join(sorted({gpu.name for gpu in found}))
    return f"{len(found)} x {names}, driver {found[0].driver}"


def device_files(found: tuple[Gpu, ...]) -> tuple[Path, ...]:
    """
    Return the device files that a test job on a GPU needs; none where no GPU can compute.

    A display adapter does not count: its driver is a large attack surface, and with devices there is no limit on memory.
    """
    dev = Path("/dev")
    nvidia = [path for path in dev.glob("nvidia*") if path.name != "nvidia-modeset"] if found else []
    amd = [dev / "kfd", dev / "dri"] if (dev / "kfd").exists() else []
    return tuple(sorted([*nvidia, *amd]))


def available_memory() -> int:
    """Return how many bytes of main memory are available now."""
    import psutil

    return int(psutil.virtual_memory().available)
