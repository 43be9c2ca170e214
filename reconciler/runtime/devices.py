"""
GPUs, as their driver reports them. Without a driver there is no GPU, and that is no error.

Rules that hold here:

1. NVIDIA's GPUs are read, through NVML. Those of AMD and Intel are not: an engine that is built for them may use AMD's in a test job, and
   the node has no facts of it, so that a model which asks for GPU memory is ``incompatible`` there.
2. Where MIG is on, the slices are the GPUs: nothing can be computed on the whole of such a card.
3. The node's GPUs are those that the operator chose for the models that are served: the settings' ``devices``, else what the variable
   ``CUDA_VISIBLE_DEVICES`` of this process says, with CUDA's own rules for it. A test runs where the model will run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reconciler.core.node import Gpu
from reconciler.runtime import device_nodes, driver_libraries

#: Files of NVIDIA's driver, on Linux and in the Windows subsystem for Linux.
_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")
#: The variable by which people choose the GPUs of a CUDA program.
VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus(chosen: tuple[str, ...] = (), *, variables: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs of this machine that are *chosen*; none, without delay, where there is no driver."""
    return visible(_all_gpus(), chosen, variables)


def visible(found: tuple[Gpu, ...], chosen: tuple[str, ...] = (), variables: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """
    Return those of *found* that are *chosen*, in that order; without a choice those that the variable names, else all.

    A word is an index, or the beginning of a UUID. As CUDA has it, the first word that names no GPU ends the list.
    """
    words = chosen or choice(variables)
    if words is None:
        return found
    taken: list[Gpu] = []
    for word in words:
        one = _named(word, found)
        if one is None or one in taken:
            break
        taken.append(one)
    return tuple(taken)


def choice(variables: Mapping[str, str] = os.environ) -> tuple[str, ...] | None:
    """Return the words of the variable ``CUDA_VISIBLE_DEVICES``; None where it is not set."""
    text = variables.get(VISIBLE)
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _named(word: str, found: tuple[Gpu, ...]) -> Gpu | None:
    if word.isdecimal():
        return next((gpu for gpu in found if gpu.index == int(word)), None)
    matching = [gpu for gpu in found if word.startswith(("GPU-", "MIG-")) and gpu.uuid.startswith(word)]
    return matching[0] if len(matching) == 1 else None


def _all_gpus() -> tuple[Gpu, ...]:
    if not _has_driver():
        return ()
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        handles = [handle for index in range(pynvml.nvmlDeviceGetCount()) for handle in _handles(pynvml, index)]
        return tuple(_gpu(pynvml, handle, number, driver) for number, handle in enumerate(handles))
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

    name = driver_libraries.MANAGEMENT
    for place in (name, driver_libraries.find(name, driver_libraries.folders())):  # once loaded, the binding gets it by its name too
        with contextlib.suppress(OSError):
            if place:
                ctypes.CDLL(str(place))
                return True
    return False


def _handles(pynvml: Any, index: int) -> Iterator[Any]:
    """Yield the handle of a GPU, or of each of its MIG slices."""
    whole = pynvml.nvmlDeviceGetHandleByIndex(index)
    with contextlib.suppress(pynvml.NVMLError):
        if pynvml.nvmlDeviceGetMigMode(whole)[0]:
            yield from _slices(pynvml, whole)
            return
    yield whole


def _slices(pynvml: Any, whole: Any) -> Iterator[Any]:
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(whole)):
        with contextlib.suppress(pynvml.NVMLError):  # a place in which no slice was made
            yield pynvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, number)


def _gpu(pynvml: Any, handle: Any, number: int, driver: str) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name, uuid = _text(pynvml.nvmlDeviceGetName(handle)), _text(pynvml.nvmlDeviceGetUUID(handle))
    return Gpu(name=name, total_bytes=int(memory.total), free_bytes=int(memory.free), driver=driver, index=number, uuid=uuid)


def _text(found: Any) -> str:
    return found.decode() if isinstance(found, bytes) else str(found)


def device_label(found: tuple[Gpu, ...]) -> str:
    """Return the device that test jobs run on, as one line of text; models are tested again when it changes."""
    if not found:
        return "cpu"
    names = ", ".join(sorted({gpu.name for gpu in found}))
    return f"{len(found)} x {names}, driver {found[0].driver}"


def roomiest(found: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Return the one of *found* with the most free memory, or none."""
    return (max(found, key=lambda gpu: gpu.free_bytes),) if found else ()


def job_devices(found: tuple[Gpu, ...]) -> device_nodes.DeviceNodes:
    """Return the device files that a test job on one of *found* needs, and what it lacks; none where no GPU can compute."""
    return device_nodes.find(nvidia=bool(found), mig=any(gpu.uuid.startswith("MIG-") for gpu in found))


def available_memory() -> int:
    """Return how many bytes of main memory are available now."""
    import psutil

    return int(psutil.virtual_memory().available)
