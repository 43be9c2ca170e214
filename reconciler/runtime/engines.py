"""
Engines by name: which are installed, in what version, and which child program tests a model with each.

An engine is an entry point of the group ``reconciler.runtimes``: a class with the methods of ``Engine``; or a server, which the
settings bind to the engine's name in a table ``[runtime.NAME]``.

Rules that hold here:

1. No engine is loaded to learn its version: that is the work of the child that tests a model.
2. Installed packages are found by the names of their folders. ``importlib.metadata`` knows them too, and takes longer to load than a
   plan takes to make: it imports a parser of e-mail. Names and files follow PEP 376, PEP 503 and PEP 427.
3. A server's child may read what the absolute paths of its command name: of the program the folder that it is installed in (the parent
   of ``bin``), of every other argument just that path. To these come the folders in ``bind``, and the Python that a virtual environment
   among all of them was made from.
4. A server that the settings name is used before an engine of the same name in another package.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from reconciler.core import digest, units
from reconciler.settings import Runtimes

#: Entry points of engines.
GROUP = "reconciler.runtimes"
#: Version of a server for which the settings give none.
UNKNOWN_VERSION = "0"


class Engine(Protocol):
    """One way to load a model and run a test job on it. *runtimes* is the settings' table ``[runtime]``."""

    #: The name that snapshots use.
    name: str
    #: Whether its child starts a program and talks to it over a loopback interface of its own.
    server: bool

    def version(self, runtimes: Runtimes) -> str | None:
        """Return the installed version (PEP 440), or None; MUST NOT load the engine."""
        ...

    def module(self) -> str:
        """Return the module whose ``main`` the child runs: JSON job in, JSON verdict out; importing it MUST NOT load the engine."""
        ...

    def options(self, runtimes: Runtimes) -> dict[str, Any]:
        """Return this engine's settings, for the child."""
        ...

    def folders(self, runtimes: Runtimes) -> tuple[Path, ...]:
        """Return what the child must be able to read beside the model, this package and the system's libraries."""
        ...


class LlamaCpp:
    """Tests GGUF models with llama.cpp, through the package ``llama-cpp-python``."""

    name = "llama-cpp"
    server = False

    def version(self, runtimes: Runtimes) -> str | None:
        """Return the package's version, without loading it."""
        del runtimes
        return package_version("llama-cpp-python")

    def module(self) -> str:
        """Return the child's module."""
        return "reconciler.runtime.llama_cpp_worker"

    def options(self, runtimes: Runtimes) -> dict[str, Any]:
        """Return the number of layers on the GPU and of threads."""
        chosen = runtimes.llama_cpp
        return {"gpu_layers": chosen.gpu_layers, "threads": chosen.threads}

    def folders(self, runtimes: Runtimes) -> tuple[Path, ...]:
        """Return the folder of compiled kernels, if there is one; it is itself among our own packages."""
        chosen = runtimes.llama_cpp.cuda_cache
        return (Path(chosen),) if chosen and Path(chosen).is_dir() else ()


class OpenAI:
    """
    Tests models through a server with the OpenAI API, which the child starts inside the sandbox.

        [runtime.llama-server]
        argv = ["/opt/llama/bin/llama-server", "-m", "{model}", "--port", "{port}"]
        version_argv = ["/opt/llama/bin/llama-server", "--version"]

    The server must listen on 127.0.0.1. *cache* is the folder in which the version is kept that its command said.
    """

    server = True

    def __init__(self, name: str = "openai", cache: Path | None = None) -> None:
        self.name = name
        self._cache = cache

    def version(self, runtimes: Runtimes) -> str | None:
        """Return the version that the settings give, or that the server's command says; None where no server is set, or it says none."""
        chosen = runtimes.server(self.name)
        if not chosen.argv or not chosen.version_argv:
            return (chosen.version or UNKNOWN_VERSION) if chosen.argv else None
        from reconciler.runtime import server_version

        return server_version.find(self.name, chosen, self._cache)

    def module(self) -> str:
        """Return the child's module."""
        return "reconciler.runtime.openai_worker"

    def options(self, runtimes: Runtimes) -> dict[str, Any]:
        """Return the server's command and environment, within how many seconds it must answer, and how much it may use."""
        chosen = runtimes.server(self.name)
        return {
            "argv": list(chosen.argv),
            "env": chosen.env,
            "ready_seconds": units.seconds(chosen.ready_timeout),
            "memory_bytes": units.size(chosen.memory),
            "processes": chosen.processes,
        }

    def folders(self, runtimes: Runtimes) -> tuple[Path, ...]:
        """Return the program's folder, both where its path points and where that resolves to, and every other path that the table names."""
        chosen = runtimes.server(self.name)
        named = [Path(argument) for argument in chosen.argv if argument.startswith("/") and "{" not in argument]
        program, others = named[:1], named[1:]
        found = [_install_folder(path) for one in program for path in (one, one.resolve())] + others + list(map(Path, chosen.bind))
        found += [base for folder in found for base in _base_python(folder)]
        return tuple(dict.fromkeys(path for path in found if path.exists() and not _is_system_path(path)))

    def command_digest(self, runtimes: Runtimes) -> str:
        """Return what tells this command line, with the server's version, from any other."""
        chosen = runtimes.server(self.name)
        told = (self.name, self.version(runtimes), chosen.argv, sorted(chosen.env.items()))
        return digest.of(msgspec.json.encode(told))


def _base_python(folder: Path) -> Iterator[Path]:
    """Yield where the Python is installed that the virtual environment *folder* was made from; nothing if it is none (PEP 405)."""
    try:
        lines = (folder / "pyvenv.cfg").read_text(errors="replace").splitlines()
    except OSError:
        return
    homes = [value.strip() for key, _, value in (line.partition("=") for line in lines) if key.strip() == "home"]
    for home in homes[:1]:
        if home.startswith("/"):
            yield from dict.fromkeys(_install_folder(path) for path in (Path(home, "python3"), Path(home, "python3").resolve()))


def _install_folder(program: Path) -> Path:
    return program.parents[1] if program.parent.name == "bin" else program


def _is_system_path(path: Path) -> bool:
    """Whether *path* is readable in the sandbox anyway; the root itself is never given."""
    return path == Path("/") or path.is_relative_to("/usr")


def known(runtimes: Runtimes | None = None, cache: Path | None = None) -> dict[str, Engine]:
    """Return every known engine by name, with the servers that *runtimes* names; the built-in ones also in a checkout never installed."""
    found: dict[str, Engine] = {"llama-cpp": LlamaCpp(), "openai": OpenAI()}
    found |= {name: OpenAI(name, cache) for name in (runtimes.servers if runtimes else ())}
    return found if found.keys() >= set(_entry_point_names(GROUP)) else _from_other_packages() | found


def _from_other_packages() -> dict[str, Engine]:
    import importlib.metadata

    return {entry.name: entry.load()() for entry in importlib.metadata.entry_points(group=GROUP)}


def installed(runtimes: Runtimes, cache: Path | None = None) -> dict[str, str]:
    """Return the installed engines' versions by name; those that servers' commands said are read from the folder *cache*."""
    versions = {name: engine.version(runtimes) for name, engine in known(runtimes, cache).items()}
    return {name: version for name, version in versions.items() if version is not None}


def remember_versions(runtimes: Runtimes, cache: Path) -> None:
    """Ask those servers' commands for their versions whose answer is not in the folder *cache*, or may be another now; keep it there."""
    for name, chosen in runtimes.servers.items():
        if chosen.version_argv:
            from reconciler.runtime import server_version

            server_version.remember(name, chosen, cache)


# -- installed packages ----------------------------------------------------------------------------


def package_version(name: str) -> str | None:
    """Return the version of the installed package *name*, or None; the first on Python's path counts."""
    wanted = _normalized(name)
    for folder in _metadata_folders():
        found, _, rest = folder.name.removesuffix(".dist-info").partition("-")
        if _normalized(found) == wanted and rest:
            return rest
    return None


def _entry_point_names(group: str) -> Iterator[str]:
    """Yield the names of the entry points of *group* that installed packages declare."""
    for folder in _metadata_folders():
        try:
            with open(f"{folder.path}/entry_points.txt", encoding="utf-8") as file:  # noqa: PTH123  each plan opens dozens
                text = file.read()
        except OSError:  # most declare nothing
            continue
        if f"[{group}]" in text:
            section = text.partition(f"[{group}]")[2].partition("\n[")[0]
            yield from (line.partition("=")[0].strip() for line in section.splitlines() if "=" in line)


def _metadata_folders() -> Iterator[os.DirEntry[str]]:
    for place in sys.path:
        try:
            with os.scandir(place or ".") as entries:
                found = [entry for entry in entries if entry.name.endswith(".dist-info")]
        except OSError:  # an archive, or gone
            continue
        yield from found


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
