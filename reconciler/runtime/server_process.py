"""
A server process in the sandbox: its command, its environment, how much it uses, and what it has opened of the model.

Rules that hold here:

1. The worker's own environment is not the server's: that gets names and folders of the sandbox, and what the settings say.
2. A server that uses more memory, more processes or, without a file system of its own, more disk than it may is killed with all that it
   started, and the test job says so.
3. What a server has loaded is what was opened while it ran, by the kernel's word (inotify(7)). No server is believed that says so itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reconciler.runtime.result import CannotTest
from reconciler.sandbox import confine

_WATCH_SECONDS = 0.1
_STOP_SECONDS = 2.0
_TAKEN = re.compile(r"\{(model|folder|name|port|context)\}")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_IN_OPEN, _IN_ISDIR = 0x20, 0x40000000
_EVENT = struct.Struct("=iIII")  # of struct inotify_event: watch, mask, cookie, length of the name
_GPU = re.compile(r"/dev/(nvidia[0-9]+|kfd|dxg|dri/render[A-Z]?[0-9]+)$")
#: Programs that fetch, ask or report over a network fail faster when they know that there is none.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def filled(argv: list[str], values: dict[str, str]) -> list[str]:
    """Return the command with what each placeholder stands for, in one pass: a path that contains another placeholder stays as it is."""
    return [_TAKEN.sub(lambda found: values[found[1]], argument) for argument in argv]


def environment(program: str, scratch: str, chosen: dict[str, str]) -> dict[str, str]:
    """Return the server's whole environment."""
    fixed = {"PATH": f"{Path(program).parent}:/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "USER": "sandbox", "LOGNAME": "sandbox"}
    places = dict.fromkeys(("HOME", "TMPDIR"), scratch) | {"XDG_CACHE_HOME": f"{scratch}/cache", "HF_HOME": f"{scratch}/hf"}
    return fixed | places | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_WAIT_POLICY": "PASSIVE"} | _OFFLINE | chosen


class ServerProcess:
    """A running server. *job* is the child's whole document."""

    def __init__(self, command: list[str], job: dict[str, Any]) -> None:
        options = job["options"]
        self._folder = Path(job["tree"])
        self._bare = "port" in job
        scratch = job.get("scratch") or os.environ.get("HOME", "/")
        self._scratch = Path(scratch) if self._bare else None
        self._bounds = (options.get("memory_bytes", 0), options.get("processes", 0), job.get("scratch_bytes", 0))
        #: Why the server was killed; empty if it was not.
        self.excess = ""
        #: Whether one of its processes had a GPU open.
        self.on_gpu = False
        self._opening = _Opening(self._folder)
        try:
            self._process = subprocess.Popen(
                confine.server_command(command) if self._bare else command,
                stdin=subprocess.DEVNULL,
                cwd="/",
                env=environment(command[0], scratch, options.get("env", {})),
            )  # its output goes to our standard error
        except OSError as error:
            raise CannotTest(f"{error}") from None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def poll(self) -> int | None:
        """Return the exit code, or the signal as a negative number; None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """Return as ``poll``, after at most *seconds*."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.poll()

    def stop(self) -> None:
        """End the server; processes that it leaves behind end with the sandbox."""
        self._ended.set()
        with contextlib.suppress(OSError):  # without namespaces and scopes no signal may be sent; the parent ends the whole group
            self._process.terminate()
            if self.wait(_STOP_SECONDS) is None:
                self._process.kill()

    @property
    def opened(self) -> set[str]:
        """Files of the model that were opened since it was started, relative to the model's folder."""
        return self._opening.files()

    def note_devices(self) -> None:
        """Note whether one of the server's processes has a GPU open now; without namespaces nothing of that can be seen."""
        self.on_gpu = self.on_gpu or any(_GPU.match(path) for path in ([] if self._bare else _open_paths()))

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_SECONDS):
            self.excess = self._too_much()
            if self.excess:
                with contextlib.suppress(OSError):
                    os.kill(self._process.pid if self._bare else -1, signal.SIGKILL)  # -1: all in this namespace but us
                return
            self.note_devices()
            self._opening.files()  # before the kernel's queue of events is full

    def _too_much(self) -> str:
        memory, processes, scratch = self._bounds
        others = [] if self._bare else _others()
        if processes and len(others) > processes:
            return f"it had {len(others):,} processes, and {processes:,} are allowed by [runtime] processes"
        if memory and others and (used := sum(map(_resident, others))) > memory:
            return f"it used {used:,} bytes of memory, and {memory:,} are allowed by [runtime] memory"
        if self._scratch and (written := sum(_sizes(self._scratch))) > scratch:
            return f"it wrote {written:,} bytes, and {scratch:,} are allowed by [runtime] file_size"
        return ""


def _others() -> list[int]:
    """Return every process in this namespace but the first, which is the sandbox's own, and this one."""
    with contextlib.suppress(OSError):
        return [pid for entry in Path("/proc").iterdir() if entry.name.isdigit() and (pid := int(entry.name)) not in {1, os.getpid()}]
    return []


def _resident(pid: int) -> int:
    """Return the bytes of memory that a process alone uses: neither mapped files nor memory that it shares."""
    try:
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * _PAGE


def _sizes(folder: Path) -> Iterator[int]:
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                yield os.lstat(os.path.join(place, name)).st_blocks * 512  # noqa: PTH118  there may be thousands


def _open_paths() -> Iterator[str]:
    """Yield the path of every file that the processes of this namespace have open."""
    for pid in _others():
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    yield str(descriptor.readlink())


class _Opening:
    """Notes which files of a folder are opened from now on."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = int(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._folders: dict[int, str] = {}
        self._found: set[str] = set()
        for place, _, _ in os.walk(folder) if self._fd >= 0 else ():
            watch = int(self._libc.inotify_add_watch(self._fd, os.fsencode(place), ctypes.c_uint32(_IN_OPEN)))
            self._folders[watch] = os.path.relpath(place, folder)

    def files(self) -> set[str]:
        """Return the files that were opened, relative to the folder; none where the kernel does not tell."""
        with contextlib.suppress(OSError):  # no more now
            while self._fd >= 0 and (events := os.read(self._fd, 1 << 16)):
                self._note(events)
        return self._found

    def _note(self, events: bytes) -> None:
        while events:
            watch, mask, _, length = _EVENT.unpack_from(events)
            name = events[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode(errors="surrogateescape")
            events = events[_EVENT.size + length :]
            if name and watch in self._folders and not mask & _IN_ISDIR:
                self._found.add(os.path.normpath(f"{self._folders[watch]}/{name}"))
