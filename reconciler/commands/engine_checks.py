"""
What ``doctor`` finds out about engines: which are installed, which are missing, and whether each configured server can be started.

Rules that hold here:

1. No engine is loaded, and no server is started; a command that says a server's version is run.
2. A server that other users can change is named, also where the settings were named by the caller and so may name anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from reconciler import files
from reconciler.core.errors import ReconcileError
from reconciler.core.node import Gpu
from reconciler.runtime import device_nodes, devices, driver_libraries, engines, server_version
from reconciler.settings import Runtimes, ServerSettings

#: An engine, how bad it is, what was found, and what to do about it.
Found = tuple[str, Literal["ok", "warning", "error"], str, str]


def engines_found(runtimes: Runtimes, wanted: set[str]) -> Iterator[Found]:
    """Yield each known engine, and each that is *wanted* by listed models."""
    installed = engines.installed(runtimes)
    for name in sorted(engines.known(runtimes).keys() | wanted):
        if name in installed:
            yield name, "ok", installed[name], ""
        elif name in wanted:
            yield name, "warning" if wanted & installed.keys() else "error", "not installed, and listed models need it", _hint(name)
        else:
            yield name, "ok", "not installed, and no model needs it", ""


def gpu_access(runtimes: Runtimes, found: tuple[Gpu, ...], dev: Path = Path("/dev")) -> Iterator[Found]:
    """Yield what keeps test jobs from the GPUs *found*, or the node from finding one that is there."""
    if not found and ((dev / "nvidiactl").exists() or (dev / "dxg").exists()):
        chosen = bool(runtimes.llama_cpp.devices) or devices.choice() is not None
        why = "none of the GPUs that devices or CUDA_VISIBLE_DEVICES choose is there" if chosen else "a driver is here, and names no GPU"
        yield "gpu", "warning", why, f"`nvidia-smi -L` lists them; libnvidia-ml.so.1 must be found: {_LIBRARY_PATH}"
    if found and runtimes.llama_cpp.gpu_layers != 0:
        nodes = device_nodes.find(dev, nvidia=True, mig=any(gpu.uuid.startswith("MIG-") for gpu in found))
        yield from (("gpu device", "warning", text, "without it test jobs do not run on the GPU") for text in nodes.lacking)
        places = driver_libraries.folders(runtimes.library_path("llama-cpp"))
        known = driver_libraries.find(driver_libraries.DRIVER, places)
        yield "gpu libraries", "ok", f"{known or 'the loader knows where'}: {', '.join(map(str, places)) or 'no folder beside its own'}", ""
    if (dev / "kfd").exists():
        text = "an AMD GPU is here: its memory is not read, so models that ask for GPU memory are skipped"
        yield "gpu amd", "warning", text, "engines that are built for it use it in test jobs all the same"


_LIBRARY_PATH = "name its folder in [runtime.llama-cpp] library_path"


def _hint(name: str) -> str:
    return {
        "llama-cpp": "`pip install llama-cpp-python` installs it",
        "openai": "name the server's command as argv in [runtime.openai]",
    }.get(name, f"name its server's command as argv in [runtime.{name}], or install the package that brings this engine")


def servers_found(runtimes: Runtimes) -> Iterator[Found]:
    """Yield of each server that the settings name whether it is there, in what version, and whether other users can change it."""
    for name, chosen in runtimes.servers.items():
        if chosen.argv:
            found = [*_lacking(name, chosen), *_changeable(name, chosen)]
            yield from found or [(name, "ok", f"{chosen.argv[0]} is there and trusted; {_version(name, chosen)}", "")]


def _lacking(name: str, chosen: ServerSettings) -> Iterator[Found]:
    problems = [_program(argv[0]) for argv in (chosen.argv, chosen.version_argv) if argv]
    problems += [f"{path} is not there" for path in chosen.bind if not Path(path).exists()]
    if chosen.version_argv and not any(problems):
        problems.append(server_version.why_unknown(chosen))
    for problem in dict.fromkeys(filter(None, problems)):
        yield name, "error", problem, f"its models stay pending until [runtime.{name}] in the settings is corrected"


def _program(path: str) -> str:
    """Return why the program at *path* cannot be started, or an empty text."""
    if not Path(path).is_file():
        return f"{path} is not there"
    return "" if os.access(path, os.X_OK) else f"{path} cannot be executed"


def _changeable(name: str, chosen: ServerSettings) -> Iterator[Found]:
    folders = engines.OpenAI(name).folders(Runtimes(servers={name: chosen}))
    for path in dict.fromkeys((Path(chosen.argv[0]), *folders)):
        try:
            files.check_trusted_path(path, os.geteuid())
        except ReconcileError as error:
            yield name, "warning", f"not to be trusted: {error.message}", error.hint
        except OSError as error:
            yield name, "warning", f"not to be trusted: {path} cannot be followed: {error.strerror}", ""


def _version(name: str, chosen: ServerSettings) -> str:
    found = engines.OpenAI(name).version(Runtimes(servers={name: chosen}))
    if chosen.version_argv:
        return f"version {found}, as its command says it"
    return f"version {found}, by the settings" if chosen.version else "the settings name no version"
