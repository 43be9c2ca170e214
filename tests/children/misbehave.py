"""One child, told by its job how to misbehave. What it is told to write goes out as it stands."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    _WAYS[job["way"]](job)


def say(document: Any) -> None:
    data = json.dumps(document).encode()
    while data:
        data = data[os.write(1, data) :]


def answer(job: dict[str, Any]) -> None:
    say({"nonce": job["nonce"], "verdict": "passed"} | json.loads(job.get("says", "{}")))


def hang(job: dict[str, Any]) -> None:
    say({"verdict": "passed"})
    signal.pause()


def answer_and_hang(job: dict[str, Any]) -> None:
    answer(job)
    signal.pause()


def answer_and_die(job: dict[str, Any]) -> None:
    answer(job)
    os.abort()


def spin(job: dict[str, Any]) -> None:
    while True:
        pass


def ignore_signals(job: dict[str, Any]) -> None:
    for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError:
            continue
    signal.pause()


def eat_memory(job: dict[str, Any]) -> None:
    kept = []
    try:
        while True:
            kept.append(bytearray(16 << 20))
    except MemoryError:
        eaten = 16 * len(kept)
        kept.clear()
        say({"nonce": job["nonce"], "mebibytes": eaten})


def fork(job: dict[str, Any]) -> None:
    """Leave a child behind that nobody waits for, in a session of its own, holding our pipes."""
    try:
        if os.fork() == 0:
            os.setsid()
            signal.pause()
    except OSError as error:
        say({"nonce": job["nonce"], "refused": type(error).__name__})
        return
    say({"nonce": job["nonce"], "refused": ""})


def flood(job: dict[str, Any]) -> None:
    block = b"x" * (1 << 20)
    for _ in range(job["mebibytes"]):
        view = memoryview(block)
        while view:
            view = view[os.write(job["to"], view) :]
    say({"nonce": job["nonce"], "verdict": "passed"})


def forge(job: dict[str, Any]) -> None:
    os.write(1, job["data"].encode())


def leave(job: dict[str, Any]) -> None:
    os._exit(job["code"])


def complain(job: dict[str, Any]) -> None:
    sys.stderr.write(job["data"])
    sys.stderr.flush()
    os._exit(job["code"])


def die(job: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if job["signal"] == "SIGABRT":
        os.abort()
    if job["signal"] == "SIGSEGV":
        ctypes.string_at(0)
    signal.raise_signal(signal.Signals[job["signal"]])


def name_thread(job: dict[str, Any]) -> None:
    """Name a thread that is not the one that writes, by its file in proc, as a driver's library does."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    name = Path(f"/proc/self/task/{thread.native_id}/comm")
    try:
        with name.open("r+") as file:
            file.write("worker")
        said = name.read_text().strip()
    except OSError as error:
        said = type(error).__name__
    done.set()
    thread.join()
    say({"nonce": job["nonce"], "name": said})


def fill(job: dict[str, Any]) -> None:
    """Write everywhere that can be written."""
    done: dict[str, int] = {}
    for folder in job["folders"]:
        written = 0
        try:
            for number in range(job["files"]):
                Path(folder, f"fill-{number}").write_bytes(b"x" * (1 << 20))
                written += 1
        except OSError:
            pass
        done[folder] = written
    say({"nonce": job["nonce"], "done": done})


def write_large(job: dict[str, Any]) -> None:
    with Path(job["path"]).open("wb", buffering=0) as file:
        file.writelines(b"x" * (1 << 20) for _ in range(64))
    say({"nonce": job["nonce"]})


def thread(job: dict[str, Any]) -> None:
    """Do what an engine does, within the rules."""
    found: list[int] = []
    running = [threading.Thread(target=found.append, args=(number,)) for number in range(16)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    say({"nonce": job["nonce"], "found": len(found)})


def look(job: dict[str, Any]) -> None:
    """Tell what can be seen from here."""
    status = Path("/proc/self/status")
    oom = Path("/proc/self/oom_score_adj")
    say({
        "nonce": job["nonce"],
        "environment": sorted(os.environ),
        "descriptors": sorted(number for number in range(256) if _is_open(number)),
        "status": status.read_text() if _readable(status) else "",
        "oom": oom.read_text().strip() if _readable(oom) else "",
        "argv": sys.argv,
        "there": [path for path in job["paths"] if _readable(Path(path))],
    })  # fmt: skip


def _readable(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


_WAYS: dict[str, Callable[[dict[str, Any]], None]] = {
    way.__name__: way
    for way in (
        answer, hang, answer_and_hang, answer_and_die, spin, ignore_signals, eat_memory, fork, flood, forge, leave, complain, die, fill,
        write_large, thread, look, name_thread,
    )
}  # fmt: skip

if __name__ == "__main__":
    main()
