"""Test jobs on tiny real models, for the tests of those who run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from reconciler import settings_file
from reconciler.core import units
from reconciler.core.snapshot import Runtime, Smoke
from reconciler.ports import TestJob
from reconciler.runtime.smoke_test import SandboxedTester


def make_tester(folder: Path, text: str = "") -> SandboxedTester:
    """A tester whose store lies in *folder*, with the settings *text* after a test's own."""
    chosen = settings_file.decode(f'[store]\npath = "store"\n{text}'.encode(), folder)
    return SandboxedTester(
        chosen.store_path / "cache",
        sandbox=chosen.smoke.sandbox,
        timeout_seconds=units.seconds(chosen.smoke.timeout),
        runtimes=chosen.engines,
    )


def folder_job(tree: Path, *, engine: str, entrypoint: str = "config.json", **smoke: Any) -> TestJob:
    """A job on the model in the folder *tree*."""
    wanted = msgspec.convert({"max_tokens": 4, "timeout": "60s", "expect": {}} | smoke, Smoke)
    return TestJob(model="m:v1", tree=tree, entrypoint=entrypoint, runtime=Runtime(engine=engine), smoke=wanted)


def job(folder: Path, data: bytes, *, engine: str = "llama-cpp", gpu_memory: int = 0, expect: Any = None, **smoke: Any) -> TestJob:
    """A job on the model *data*, which is put into *folder*."""
    tree = folder / "tree"
    tree.mkdir(exist_ok=True)
    (tree / "model.gguf").write_bytes(data)
    wanted = msgspec.convert({"max_tokens": 4, "timeout": "60s", "expect": expect or {}} | smoke, Smoke)
    return TestJob(model="m:v1", tree=tree, entrypoint="model.gguf", runtime=Runtime(engine=engine), smoke=wanted, gpu_memory=gpu_memory)
