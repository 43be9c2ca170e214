"""The engine llama-cpp: llama.cpp through llama-cpp-python, in the child."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reconciler.runtime import installed_packages
from reconciler.settings import Settings


class LlamaCpp:
    """Tests GGUF models with the package ``llama-cpp-python``."""

    name = "llama-cpp"
    server = False

    def version(self, settings: Settings) -> str | None:
        """Return the package's version, without loading it."""
        del settings
        return installed_packages.version("llama-cpp-python")

    def module(self) -> str:
        """Return the child's module."""
        return "reconciler.runtime.llama_cpp_worker"

    def options(self, settings: Settings) -> dict[str, Any]:
        """Return layers on the GPU and threads."""
        chosen = settings.runtime.llama_cpp
        return {"gpu_layers": chosen.gpu_layers, "threads": chosen.threads}

    def folders(self, settings: Settings) -> tuple[Path, ...]:
        """Return nothing: it lies among our own packages."""
        del settings
        return ()
