"""
The engine openai: any server with the OpenAI API, started from the settings' *argv* inside the sandbox.

    [runtime.openai]
    argv = ["/opt/llama/bin/llama-server", "-m", "{model}", "--port", "{port}"]
    version = "1.0"

``{model}`` and ``{port}`` are filled in; the server must listen on 127.0.0.1. What its absolute paths name is readable to it: of the
program the folder that it is installed in (that above ``bin``), of other arguments just the path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reconciler.core import units
from reconciler.settings import Runtimes

#: Version of a server that the settings tell none of.
UNTOLD = "0"


class OpenAI:
    """Tests models by way of a server with the OpenAI API."""

    name = "openai"
    server = True

    def version(self, runtimes: Runtimes) -> str | None:
        """Return the version that the settings tell; None where no server is set."""
        chosen = runtimes.openai
        return (chosen.version or UNTOLD) if chosen.argv else None

    def module(self) -> str:
        """Return the child's module."""
        return "reconciler.runtime.openai_worker"

    def options(self, runtimes: Runtimes) -> dict[str, Any]:
        """Return the command and how many seconds it may take until it answers."""
        chosen = runtimes.openai
        return {"argv": list(chosen.argv), "ready_seconds": units.seconds(chosen.ready_timeout)}

    def folders(self, runtimes: Runtimes) -> tuple[Path, ...]:
        """Return where the program lies, as it is named and as it is found, and what else its arguments name."""
        named = [Path(argument) for argument in runtimes.openai.argv if argument.startswith("/") and "{" not in argument]
        program, others = named[:1], named[1:]
        found = [_installed_in(path) for one in program for path in (one, one.resolve())] + others
        return tuple(dict.fromkeys(path for path in found if path.exists() and not _is_there_anyway(path)))


def _installed_in(program: Path) -> Path:
    return program.parents[1] if program.parent.name == "bin" else program


def _is_there_anyway(path: Path) -> bool:
    """Whether *path* is the system's; the root itself is never given."""
    return path == Path("/") or path.is_relative_to("/usr")
