"""
Builds ggml with its CUDA backend beside llama-cpp-python's other libraries, where the one in a wheel does not load or is not in it.

    python -m benchmarks.gpu_backend --loads                    ends with 0 if the installed engine has a CUDA backend that loads
    python -m benchmarks.gpu_backend SOURCES LIBRARIES          builds the sources of ggml into the folder LIBRARIES

All of ggml is built, since which backends there are is compiled into it; llama.cpp's own library stays. Needs nvcc, a C++ compiler, CMake
and ninja, and cuBLAS from the toolkit or from the Python package nvidia-cublas. ``GGML_CUDA=OFF`` in the environment builds it without
CUDA, to try this program where there is no nvcc.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reconciler.runtime import driver_libraries

#: Longer than this the check would not come to its end on a machine that is lent for minutes.
_SECONDS = 360.0
_LIBRARIES = ("libggml.so", "libggml-base.so", "libggml-cpu.so", "libggml-cuda.so")


def main(arguments: list[str]) -> int:
    if arguments == ["--loads"]:
        return 0 if loads() else 1
    sources, libraries = map(Path, arguments)
    with tempfile.TemporaryDirectory(prefix="ggml-") as folder:
        build(sources, libraries, Path(folder))
    return 0


def loads() -> bool:
    """Whether the installed engine starts, and names CUDA among its parts; asked in a process that may die of it."""
    code = "import llama_cpp, sys; sys.exit(b'CUDA' not in llama_cpp.llama_print_system_info())"
    variables = os.environ | {"LD_LIBRARY_PATH": ":".join(map(str, driver_libraries.folders()))}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, check=False).returncode == 0


def build(sources: Path, libraries: Path, folder: Path) -> None:
    """Build ggml from *sources* in *folder*, and put its libraries in *libraries*."""
    began = time.monotonic()
    cuda = os.environ.get("GGML_CUDA", "ON")
    defined = {
        "CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "ON", "GGML_CUDA": cuda, "GGML_CUDA_NO_VMM": "ON", "GGML_CUDA_NCCL": "OFF",
        "GGML_CUDA_FA": "OFF", "GGML_OPENMP": "OFF", "GGML_BUILD_TESTS": "OFF", "GGML_BUILD_EXAMPLES": "OFF",
        "CMAKE_INSTALL_RPATH": "$ORIGIN",
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON", "CMAKE_CUDA_ARCHITECTURES": (sources / "architecture").read_text().strip(),
    }  # fmt: skip
    defined |= _cublas(folder) if cuda == "ON" else {}
    options = [f"-D{key}={value}" for key, value in defined.items()]
    whole = folder / "whole"  # as part of another project ggml asks for no file that its release lacks
    whole.mkdir()
    lines = ("cmake_minimum_required(VERSION 3.18)", "project(backend C CXX)", f'add_subdirectory("{sources.resolve()}" ggml)')
    (whole / "CMakeLists.txt").write_text("\n".join(lines) + "\n")
    subprocess.run(["cmake", "-S", whole, "-B", folder / "build", "-G", "Ninja", *options], check=True, timeout=_SECONDS)
    left = _SECONDS - (time.monotonic() - began)
    subprocess.run(["cmake", "--build", folder / "build", "--target", "ggml"], check=True, timeout=left)
    for name in _LIBRARIES:
        for made in sorted((folder / "build").rglob(f"{name}*")):
            if not made.is_symlink() or made.name.count(".") < 3:  # the name that programs ask for, and the plain one
                shutil.copy2(made.resolve(), libraries / made.name)
    print(f"ggml was built in {time.monotonic() - began:.0f} s")


def _cublas(folder: Path) -> dict[str, str]:
    """Return where cuBLAS is, if only a Python package has it; of its headers none but its own, the others clash with nvcc's."""
    library = driver_libraries.find("libcublas.so.13", driver_libraries.folders())
    headers = library.parents[1] / "include" if library else None
    if library is None or headers is None or not (headers / "cublas_v2.h").exists() or "nvidia" not in library.parts:
        return {}
    own = folder / "include"
    own.mkdir()
    for header in headers.glob("cublas*.h"):
        shutil.copy2(header, own)
    return {"CUDA_cublas_LIBRARY": str(library), "CMAKE_CUDA_FLAGS": f"-I{own}"}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
