"""
Shows, on a machine with an NVIDIA GPU, that a test job runs on the GPU inside the sandbox: ``make gpu-check``.

It builds llama-cpp-python with CUDA into an environment of its own, makes a model of a few hundred MiB, lets a whole node apply it from a
local server in each sandbox mode that works, and compares what the engine said with what the driver saw: memory before, during, after.
Then the same model on the CPU, for the rate. Without a GPU it says so and fails.

    python -m benchmarks.gpu_check             build, then measure
    python -m benchmarks.gpu_check --measure   measure with this interpreter's llama-cpp-python
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from reconciler.core.node import Gpu
from reconciler.demo import models
from reconciler.demo.server import serving
from reconciler.runtime import devices
from reconciler.sandbox import choose
from tests.network import Document
from tests.node import Node

TOP = Path(__file__).resolve().parents[1]
VENV = TOP / ".gpu-check"
SHAPE = models.Shape(seed="gpu-check", width=2048, layers=4, heads=16)
TOKENS = 128
_SAMPLE_SECONDS = 0.01
#: What a driver may keep of a process that ended, or another process take meanwhile.
_SLACK_BYTES = 64 << 20


class Failed(Exception):
    """The GPU was not shown to run the model."""


class Measured(Struct, frozen=True, kw_only=True):
    """One test job, as its report and the driver tell of it; memory in bytes."""

    where: str
    sandbox: str
    layers: int
    told: int
    before: int
    most: int
    after: int
    rate: float
    load_seconds: float


def main(arguments: list[str]) -> int:
    """Build and measure; return the exit code."""
    found = devices.gpus()
    if not found:
        print("gpu-check: no NVIDIA GPU answers on this machine (no driver, or no device): nothing was shown")
        return 1
    if arguments != ["--measure"]:
        return subprocess.run([built(), "-m", "benchmarks.gpu_check", "--measure"], cwd=TOP, check=False).returncode
    try:
        report(found[0], measure())
    except Failed as error:
        print(f"gpu-check: failed: {error}")
        return 1
    return 0


def built() -> Path:
    """Return the interpreter of an environment whose llama-cpp-python was built with CUDA."""
    python = VENV / "bin" / "python"
    if (VENV / "ready").exists():
        return python
    if shutil.which("nvcc") is None:
        print("gpu-check: nvcc is not in PATH: the CUDA toolkit is needed to build llama-cpp-python")
        raise SystemExit(1)
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    version = importlib.metadata.version("llama-cpp-python")
    cuda = os.environ | {"CMAKE_ARGS": f"-DGGML_CUDA=on {os.environ.get('CMAKE_ARGS', '')}".strip()}
    binary = ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *binary, "-e", f"{TOP}[demo]"], env=cuda, check=True)
    (VENV / "ready").touch()
    return python


def measure() -> list[Measured]:
    """Run the test job in every sandbox that works, on the GPU and beside it."""
    modes = [found.mode for found in choose.probe_all() if found.works]
    if not modes:
        raise Failed("no sandbox works here, and nothing is tested without one")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        path = Path(folder, "model.gguf")
        models.write(SHAPE, path)
        data = path.read_bytes()
        path.unlink()
        made = [applied(Path(folder, f"gpu-{mode}"), data, mode, on_gpu=True) for mode in modes]
        made.append(applied(Path(folder, "cpu"), data, modes[0], on_gpu=False))
    for one in made[:-1]:
        refuse(one, len(data))
    return made


def applied(folder: Path, data: bytes, mode: str, *, on_gpu: bool) -> Measured:
    """Apply a snapshot with the model on a node of its own; return what its test job did, and what the driver saw meanwhile."""
    with serving() as server:
        node = Node(folder, server)
        layers = -1 if on_gpu else 0
        node.configure(f'[smoke]\nsandbox = "{mode}"\n[runtime.llama-cpp]\ngpu_layers = {layers}\n')
        smoke = {"prompt": "Hello", "max_tokens": TOKENS, "timeout": "300s"}
        node.publish(node.item("large:v1", data, smoke=smoke, gpu_memory=len(data) if on_gpu else 0))
        with watched() as seen:
            ran = node.run("apply")
        after = used()
        if ran.code != 0 or node.states() != {"large:v1": "active"}:
            raise Failed(f"the model is not active in {mode}: {ran.out[-1000:]}{ran.err[-1000:]}")
        test: Document = node.run("status", "large:v1", "--json").json["models"][0]["test"]
    return Measured(
        where=test.get("device", ""),
        sandbox=test.get("sandbox", ""),
        layers=test.get("gpu_layers", 0),
        told=test.get("gpu_memory_used", 0),
        before=seen[0],
        most=max(seen),
        after=after,
        rate=test["tokens_per_second"],
        load_seconds=test["load_seconds"],
    )


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """Note the GPU's used bytes, before and as long as this is entered."""
    seen, stop = [used()], threading.Event()

    def watch() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            seen.append(used())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        stop.set()
        watching.join()


def used() -> int:
    """Return the bytes in use on all GPUs."""
    return sum(gpu.total_bytes - gpu.free_bytes for gpu in devices.gpus())


def refuse(one: Measured, size: int) -> None:
    """
    Hold a test job to what running on the GPU means.

    Raises:
        Failed: the engine or the driver says otherwise.
    """
    if one.layers != SHAPE.layers + 1:
        raise Failed(f"{one.layers} of {SHAPE.layers + 1} layers ran on the GPU in {one.sandbox}")
    if one.most - one.before < size // 2:
        raise Failed(f"the driver saw only {_mib(one.most - one.before)} more in use, for a model of {_mib(size)}")
    if one.after - one.before > _SLACK_BYTES:
        raise Failed(f"{_mib(one.after - one.before)} of the GPU's memory did not come back after the test job in {one.sandbox}")


def report(gpu: Gpu, made: list[Measured]) -> None:
    """Print what was measured, as a table for the results."""
    version = importlib.metadata.version("llama-cpp-python")
    print(f"{gpu.name}, driver {gpu.driver}, llama-cpp-python {version} with CUDA")
    print(f"a model of {SHAPE.layers} layers of width {SHAPE.width}, {TOKENS} tokens\n")
    print("| where | sandbox | layers on the GPU | the engine says | before | most during | after | load | tokens/s |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for one in made:
        memory = " | ".join(_mib(size) for size in (one.told, one.before, one.most, one.after))
        print(f"| {one.where} | {one.sandbox} | {one.layers} | {memory} | {one.load_seconds:.2f} s | {one.rate:.1f} |")


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
