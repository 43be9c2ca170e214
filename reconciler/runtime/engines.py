"""
Engines by name: which are installed, in what version, and which child program tests a model with each.

An engine is an entry point of the group ``reconciler.runtimes``: a class with the methods of ``Engine``. None of them is loaded to
be asked for its version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from reconciler.runtime import installed_packages
from reconciler.settings import Runtimes

GROUP = "reconciler.runtimes"


class Engine(Protocol):
    """One way to load a model and run a test job on it."""

    #: As snapshots name it.
    name: str
    #: Whether its child starts a program and talks to it over a loopback of its own.
    server: bool

    def version(self, runtimes: Runtimes) -> str | None:
        """Return the installed version (PEP 440), or None; MUST NOT load the engine."""
        ...

    def module(self) -> str:
        """Return the module whose ``main`` the child runs: JSON job in, JSON verdict out; importing it MUST NOT load the engine."""
        ...

    def options(self, runtimes: Runtimes) -> dict[str, Any]:
        """Return what the settings say about this engine, for the child."""
        ...

    def folders(self, runtimes: Runtimes) -> tuple[Path, ...]:
        """Return what the child must be able to read beside the model, this package and the system's libraries."""
        ...


def known() -> dict[str, Engine]:
    """Return every engine that is known here, by name; the built-in ones also in a checkout that was never installed."""
    from reconciler.runtime.llama_cpp import LlamaCpp
    from reconciler.runtime.openai import OpenAI

    found: dict[str, Engine] = {"llama-cpp": LlamaCpp(), "openai": OpenAI()}
    return found if found.keys() >= set(installed_packages.declared(GROUP)) else _others() | found


def _others() -> dict[str, Engine]:
    import importlib.metadata

    return {entry.name: entry.load()() for entry in importlib.metadata.entry_points(group=GROUP)}


def installed(runtimes: Runtimes) -> dict[str, str]:
    """Return the installed engines' versions by name."""
    versions = {name: engine.version(runtimes) for name, engine in known().items()}
    return {name: version for name, version in versions.items() if version is not None}
