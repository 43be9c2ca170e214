"""
What a test job is given of the node's GPUs, and why one on such a node ran without.

Rules that hold here:

1. A test runs where the model will be served: on the GPUs that the operator chose, and on one of them unless splitting is permitted.
   That one has the most free memory; the child sees no other.
2. On a node with a GPU no test that ran on the CPU passes in silence: it could not be tested, and the reason begins with ``UNUSED``. What
   counts as the node's wish for the CPU is ``gpu_layers = 0``, and nothing else.
3. A server decides for itself where it runs a model; it is held to the GPU only where the network says that the model needs one.
4. llama.cpp that was built with CUDA needs CUDA's libraries to start, on the CPU and without any GPU too: it is led to them in any case.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from msgspec import Struct

from reconciler.core.node import Gpu
from reconciler.ports import TestJob, TestReport
from reconciler.runtime import devices, driver_libraries
from reconciler.sandbox.supervision import printable
from reconciler.settings import Runtimes

UNUSED = "the GPU was not used"
#: What engines say where they find no device, or no library of it.
_SAYS = re.compile(
    r"(cuda|nvidia|libcublas|libcudart|hip|rocm).*(fail|error|no |not |cannot|insufficient|unsupported|invalid)", re.IGNORECASE
)
_BUILT_WITHOUT = (
    "llama-cpp-python is built without CUDA; "
    'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python'
)
_ON_PURPOSE = "where models are served on the CPU on purpose, set [runtime.llama-cpp] gpu_layers = 0"


class GpuUse(Struct, frozen=True, kw_only=True):
    """The GPUs that a test job may use, and what comes with them."""

    gpus: tuple[Gpu, ...] = ()
    devices: tuple[Path, ...] = ()
    #: Folders to read, which hold the driver's and CUDA's libraries.
    read: tuple[Path, ...] = ()
    variables: dict[str, str] = {}
    #: Device files that are missing or closed, in sentences.
    lacking: tuple[str, ...] = ()
    #: Whether the settings have models served on the CPU although there is a GPU.
    on_cpu: bool = False

    @property
    def free_bytes(self) -> int:
        """Free memory of all of them."""
        return sum(gpu.free_bytes for gpu in self.gpus)


def of_job(found: tuple[Gpu, ...], runtimes: Runtimes, engine: str, *, server: bool) -> GpuUse:
    """Return what a test job with *engine* is given of the node's GPUs *found*."""
    own = runtimes.llama_cpp
    places = driver_libraries.folders(runtimes.library_path(engine))
    read = tuple(place for place in places if place.is_dir() and not place.is_relative_to("/usr"))
    on_cpu = GpuUse() if server else GpuUse(read=read, variables=_variables((), places, ""))  # rule 4
    if not server and own.gpu_layers == 0:
        return msgspec.structs.replace(on_cpu, on_cpu=bool(found))
    used = found if server or own.split else devices.roomiest(found)
    nodes = devices.job_devices(used)
    if not nodes.given:
        return msgspec.structs.replace(on_cpu, gpus=used, lacking=nodes.lacking)
    chosen = bool(own.devices) or devices.choice() is not None or not server
    return GpuUse(
        gpus=used,
        devices=nodes.given,
        read=read,
        variables=_variables(used if chosen else (), places, "" if server else own.cuda_cache),
        lacking=nodes.lacking,
    )


def _variables(used: tuple[Gpu, ...], places: tuple[Path, ...], cache: str) -> dict[str, str]:
    """Return the variables that lead CUDA to its libraries and to the chosen GPUs, by their UUIDs: numbers depend on an order."""
    names = ",".join(gpu.uuid or str(gpu.index) for gpu in used)
    found = {devices.VISIBLE: names, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if used else {}
    found |= {"LD_LIBRARY_PATH": ":".join(map(str, places))} if places else {}
    return found | ({"CUDA_CACHE_PATH": cache, "CUDA_CACHE_DISABLE": "0"} if cache else {})


def judged(
    report: TestReport,
    job: TestJob,
    use: GpuUse,
    *,
    on_gpu: bool,
    server: bool,
    seen: bool = True,
    errors: str = "",
    offload: bool = True,
) -> TestReport:
    """
    Return *report* with the device that really ran the model, if any did; one that should have used one and did not is not passed.

    *on_gpu*: a process of a server had a GPU open; *seen*: whether that could be seen, which takes namespaces. *errors* is what the engine
    wrote; *offload*: whether it is built for a GPU at all.
    """
    on_gpu = on_gpu or report.gpu_layers > 0
    ran = report.verdict == "passed" or report.load_seconds > 0
    device = (use.gpus[0].device if use.gpus else "a GPU that no driver names") if on_gpu else "cpu" if ran else ""
    report = msgspec.structs.replace(report, device=device)
    expected = bool(use.gpus) and (not server or (seen and job.gpu_memory > 0))
    if report.verdict != "passed" or on_gpu or not expected:
        return report
    return msgspec.structs.replace(report, verdict="unable", reason=f"{UNUSED}: {_why(use, errors, offload=offload, server=server)}"[:1000])


def _why(use: GpuUse, errors: str, *, offload: bool, server: bool) -> str:
    if server:
        return "; ".join(use.lacking) or "no process of the server had it open"
    said = [line.strip() for line in errors.splitlines() if _SAYS.search(line)]
    cause = _BUILT_WITHOUT if not offload else "; ".join(use.lacking) or (printable(said[-1])[:300] if said else "")
    if not cause:
        cause = "the engine put no layer on it, and says nothing of why"
    return f"{cause}; {_ON_PURPOSE}"
