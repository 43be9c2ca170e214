"""
The version of a configured server, as its own command says it.

Rules that hold here:

1. The command is run again only when its program, its installation or a bound folder has changed: it may take many seconds, and a plan
   takes a tenth of one.
2. A reader of the store asks and writes nothing. Only ``remember`` writes, and its caller holds the store.
3. A command that fails, or says no version, gives None: then the engine is missing, and nothing is concluded about any model.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import threading
from pathlib import Path

import msgspec

from reconciler.settings import VERSION, ServerSettings

_SECONDS = 60.0
_OUTPUT_CHARACTERS = 16_384
_PATH = "/usr/local/bin:/usr/bin:/bin"
#: After a word for it, or else the first number with a dot.
_NAMED = re.compile(rf"\bversion[:=]?\s+v?b?({VERSION})", re.IGNORECASE)
_DOTTED = re.compile(rf"(?<![\w.])v?((?=[0-9]+\.){VERSION})")


def find(engine: str, chosen: ServerSettings, cache: Path | None) -> str | None:
    """Return the version that the server's command says, from *cache* where nothing has changed since it was asked; None: it says none."""
    key = _key(chosen)
    return _remembered(engine, key, cache) or _asked(chosen.version_argv, tuple(sorted(chosen.env.items())), key)


def remember(engine: str, chosen: ServerSettings, cache: Path) -> None:
    """Ask the server's command, unless *cache* knows the answer, and write the answer there."""
    key = _key(chosen)
    if not chosen.version_argv or _remembered(engine, key, cache):
        return
    found = find(engine, chosen, cache)
    if found is None:
        return
    with contextlib.suppress(OSError):
        cache.mkdir(mode=0o755, parents=True, exist_ok=True)
        path = _place(engine, cache)
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
        temporary.write_bytes(msgspec.json.encode((key, found)))
        temporary.replace(path)


def why_unknown(chosen: ServerSettings) -> str:
    """Return what went wrong when the command was asked now; empty if it says a version."""
    try:
        ended = _run(chosen.version_argv, dict(chosen.env))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{chosen.version_argv[0]} does not run: {error}"[:300]
    if ended.returncode:
        return f"{chosen.version_argv[0]} ended with {ended.returncode}"
    return "" if version_in(ended.stdout) else f"{chosen.version_argv[0]} printed no version"


def version_in(text: str) -> str | None:
    """Return the first version that *text* names, or None."""
    found = _NAMED.search(text) or _DOTTED.search(text)
    return found[1].rstrip(".-+") if found else None


def _remembered(engine: str, key: str, cache: Path | None) -> str | None:
    if cache is None:
        return None
    with contextlib.suppress(OSError, msgspec.DecodeError):
        known = msgspec.json.decode(_place(engine, cache).read_bytes(), type=tuple[str, str])
        if known[0] == key and re.fullmatch(VERSION, known[1]):
            return known[1]
    return None


def _place(engine: str, cache: Path) -> Path:
    return cache / f"engine-{engine}.json"


@functools.cache
def _asked(argv: tuple[str, ...], environment: tuple[tuple[str, str], ...], _key: str) -> str | None:
    try:
        ended = _run(argv, dict(environment))
    except (OSError, subprocess.SubprocessError):
        return None
    return version_in(ended.stdout) if ended.returncode == 0 else None


def _run(argv: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command without our environment; what it writes to standard error counts too, since llama-server says its version there."""
    ended = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        env={"PATH": _PATH, "LANG": "C.UTF-8", "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        timeout=_SECONDS,
        check=False,
    )
    text = ended.stdout.decode(errors="replace")[:_OUTPUT_CHARACTERS]
    return subprocess.CompletedProcess(ended.args, ended.returncode, text)


def _key(chosen: ServerSettings) -> str:
    """Return a text that changes with the command, and with what is installed where its programs and *bind* lie."""
    programs = {*chosen.argv[:1], *chosen.version_argv[:1]}
    folders = [Path(program).parents[1] for program in programs if Path(program).parent.name == "bin"] + [
        Path(text) for text in chosen.bind
    ]
    seen = [*map(Path, sorted(programs)), *folders]
    seen += [packages for folder in folders for packages in sorted(folder.glob("lib/python3*/site-packages"))]
    return f"{chosen.version_argv} {sorted(chosen.env.items())} {' '.join(map(_seen, dict.fromkeys(seen)))}"


def _seen(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return f"{path} missing"
    return f"{path} {found.st_ino} {found.st_mtime_ns} {found.st_size}"
