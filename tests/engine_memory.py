"""
What llama.cpp allocates for a model, by its own log: weights, cache, compute buffer, results. Measured in a process of its own.

    python -m tests.engine_memory FILE '{"context": 512}'     prints the bytes of each kind as JSON
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from reconciler.core.fit import Job

_BUFFER = re.compile(r"\w+:\s+(\S+)\s+(model|output|KV|RS|compute) buffer size\s*=\s*([\d.]+) MiB")
_TYPES = {"F32": 0, "F16": 1, "Q8_0": 8, "Q4_0": 2}
TOP = Path(__file__).resolve().parents[1]


def measure(path: Path, job: Job, *, embedding: bool) -> dict[str, int]:
    """Return the bytes of each kind of buffer that llama.cpp makes on the CPU for the model at *path*."""
    given = json.dumps(msgspec.to_builtins(job) | {"embedding": embedding})
    command = [sys.executable, "-m", "tests.engine_memory", str(path), given]
    ran = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main(path: str, given: dict[str, Any]) -> None:
    import llama_cpp
    import llama_cpp.llama_cpp

    found: dict[str, float] = {}

    def note(_level: int, text: bytes, _: Any) -> None:
        if buffer := _BUFFER.match(text.decode(errors="replace").strip()):
            kind, size = buffer[2], float(buffer[3])
            found[kind] = max(found.get(kind, 0.0), size) if kind == "compute" else found.get(kind, 0.0) + size

    defaults = llama_cpp.llama_model_default_params

    def as_stored() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False  # weights repacked for this processor would be counted in place of some of the file's
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = as_stored
    callback = llama_cpp.llama_log_callback(note)
    llama_cpp.llama_log_set(callback, None)
    llama_cpp.Llama(
        model_path=path, n_ctx=given["context"], n_batch=given["context"], n_ubatch=given["batch"], n_gpu_layers=0, use_mmap=True,
        type_k=_TYPES[given["key_type"]], type_v=_TYPES[given["value_type"]], flash_attn=given["flash"], embedding=given["embedding"],
        logits_all=False, verbose=True, n_threads=1,
    )  # fmt: skip
    print(json.dumps({kind: int(size * (1 << 20)) for kind, size in found.items()}), flush=True)
    import os

    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
