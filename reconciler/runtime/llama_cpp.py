"""The engine llama-cpp: llama.cpp through llama-cpp-python, in the child."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reconciler.runtime import installed_packages
from reconciler.settings import Runtimes


class LlamaCpp:
    """Tests GGUF models with the package ``llama-cpp-python``."""

    name = "llama-cpp"
    server = False

    def version(self, runtimes: Runtimes) -> str | None:
        """Return the package's version, without loading it."""
        del runtimes
        return installed_packages.version("llama-cpp-python")

    def module(self) -> str:
        """Return the child's module."""
        return "reconciler.runtime.llama_cpp_worker"

    def options(self, runtimes: Runtimes) -> dict[str, Any]:
        """Return layers on the GPU and threads."""
        chosen = runtimes.llama_cpp
        return {"gpu_layers": chosen.gpu_layers, "threads": chosen.threads}

    def folders(self, runtimes: Runtimes) -> tuple[Path, ...]:
        """Return nothing: it lies among our own packages."""
        del runtimes
        return ()
