"""
The inside of the sandbox: what the child does to itself before it runs a line of what it was started for.

Limits, a seccomp filter and, where there are no namespaces, Landlock; by ``ctypes`` and ``prctl``, without a dependency. Nothing here
can be undone by the process (``PR_SET_NO_NEW_PRIVS``; seccomp(2), landlock(7)). Whatever cannot be set up ends the child at once, with
``SETUP_FAILED``, before any of the model is read.

Run as ``python -I -c BOOTSTRAP SETUP``: *SETUP* is a JSON document, standard input is the job's.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import runpy
import signal
import stat
import struct
import sys
from typing import Any

#: Exit code of a child that could not confine itself.
SETUP_FAILED = 97

#: Argument of ``python -I -c``: this package's folder is named, since an isolated interpreter has no other way to a checkout.
BOOTSTRAP = "import sys; sys.path.insert(0, sys.argv[2]); from reconciler.runtime import cage; cage.main(sys.argv[1])"

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_DUMPABLE = 1, 38, 22, 4
_SECCOMP_MODE_FILTER = 2

#: (audit architecture, system call numbers) by machine; asm/unistd.h of each.
_MACHINES = {
    "x86_64": (0xC000003E, {
        "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "utime": 132, "setxattr": 188, "lsetxattr": 189,
        "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "utimes": 235, "fchownat": 260, "futimesat": 261,
        "fchmodat": 268, "utimensat": 280, "fchmodat2": 452, "socket": 41, "socketpair": 53, "connect": 42, "clone": 56, "execve": 59,
        "kill": 62, "ptrace": 101, "pivot_root": 155,
        "chroot": 161, "mount": 165, "umount2": 166, "reboot": 169, "init_module": 175, "tkill": 200, "kexec_load": 246, "add_key": 248,
        "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "open_by_handle_at": 304, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313, "bpf": 321, "execveat": 322, "userfaultfd": 323,
        "pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438,
    }),
    "aarch64": (0xC00000B7, {
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "fchmod": 52,
        "fchmodat": 53, "fchownat": 54, "fchown": 55, "utimensat": 88, "fchmodat2": 452, "umount2": 39, "mount": 40, "pivot_root": 41,
        "chroot": 51, "unshare": 97, "kexec_load": 104, "init_module": 105, "ptrace": 117,
        "kill": 129, "tkill": 130, "reboot": 142, "socket": 198, "socketpair": 199, "connect": 203, "add_key": 217, "request_key": 218,
        "keyctl": 219, "clone": 220, "execve": 221, "perf_event_open": 241, "open_by_handle_at": 265, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "finit_module": 273, "bpf": 280, "execveat": 281, "userfaultfd": 282,
        "pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438,
    }),
}  # fmt: skip
_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
_ALLOW, _DENY, _ABSENT, _KILL = 0x7FFF0000, 0x00050000 | 13, 0x00050000 | 38, 0x80000000  # EACCES, ENOSYS

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LEAST_LANDLOCK = 3  # before it, truncate(2) was not governed
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # rights known to a version; 16 from the fifth on
_READ_FILE, _WRITE_FILE, _READ_DIR, _EXECUTE, _TRUNCATE, _IOCTL = 1 << 2, 1 << 1, 1 << 3, 1 << 0, 1 << 14, 1 << 15


class SetupFailed(Exception):
    """The child could not confine itself."""


def main(setup: str) -> None:
    """Confine this process as *setup* says, and run its module."""
    try:
        wanted = json.loads(setup)
        confine(wanted)
    except Exception as error:  # noqa: BLE001  whatever it was: nothing may run now
        sys.stderr.write(f"the sandbox could not be set up: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(SETUP_FAILED)
    runpy.run_module(wanted["module"], run_name="__main__")


def confine(wanted: dict[str, Any]) -> None:
    """Set up death with the parent, limits, Landlock if asked for, and the filter, in this order: each could forbid the one before."""
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if wanted["parent"] and os.getppid() != wanted["parent"]:
        raise SetupFailed("the parent is gone")
    _limit(wanted["limits"])
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call(libc.prctl, _PR_SET_DUMPABLE, 0, 0, 0, 0)
    if wanted["landlock"]:
        _landlock(libc, wanted["read"], wanted["write"], wanted["devices"])
    _seccomp(libc)


def _limit(limits: dict[str, int]) -> None:
    for name, most in limits.items():
        number = getattr(resource, name)
        _, hard = resource.getrlimit(number)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(number, (allowed, allowed))


def _call(function: Any, *arguments: int) -> int:
    found = function(*(ctypes.c_ulong(argument) for argument in arguments))
    if found < 0:
        raise SetupFailed(os.strerror(ctypes.get_errno()))
    return int(found)


# -- Landlock --------------------------------------------------------------------------------------


def landlock_version() -> int:
    """Return the kernel's Landlock version, 0 where there is none: asked of the system call, not of the kernel's name."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(0, int(found))


def _landlock(libc: Any, read: list[str], write: list[str], devices: list[str]) -> None:
    version = landlock_version()
    if version < _LEAST_LANDLOCK:
        raise SetupFailed(f"Landlock {version} is too old, {_LEAST_LANDLOCK} is needed" if version else "the kernel has no Landlock")
    rights = (1 << _FS_BITS.get(version, 16)) - 1
    attributes = struct.pack("QQQ", rights, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        raise SetupFailed(f"Landlock: {os.strerror(ctypes.get_errno())}")
    for path in read:
        _allow(libc, ruleset, path, _READ_FILE | _READ_DIR)
    for path in write:
        _allow(libc, ruleset, path, rights & ~_EXECUTE)
    for path in devices:
        _allow(libc, ruleset, path, (_READ_FILE | _WRITE_FILE | _READ_DIR | _IOCTL) & rights)
    if libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT), ctypes.c_int(ruleset), ctypes.c_uint32(0)):
        raise SetupFailed(f"Landlock: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


def _allow(libc: Any, ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _READ_FILE | _WRITE_FILE | _EXECUTE | _TRUNCATE | _IOCTL
        rule = struct.pack("=Qi", rights, fd)
        if libc.syscall(ctypes.c_long(_LANDLOCK_ADD), ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0)):
            raise SetupFailed(f"Landlock for {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)


# -- seccomp ---------------------------------------------------------------------------------------


def _seccomp(libc: Any) -> None:
    """
    Deny sockets of every family, new programs, new namespaces, and every way to other processes and to the kernel's insides.

    Modes, owners, times and attributes too: Landlock does not govern them, and the model's file is the store's own.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        raise SetupFailed(f"no system call filter is known for {machine}")
    program = b"".join(_filter(*_MACHINES[machine]))
    buffer = ctypes.create_string_buffer(program)
    pointer = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    keep = ctypes.create_string_buffer(pointer)
    _call(libc.prctl, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(keep), 0, 0)


def _filter(architecture: int, numbers: dict[str, int]) -> list[bytes]:
    """Return classic BPF (linux/filter.h) over struct seccomp_data: number at 0, architecture at 4, first argument at 16."""

    def load(offset: int) -> bytes:
        return struct.pack("HBBI", 0x20, 0, 0, offset)

    def jump(code: int, value: int, true: int, false: int) -> bytes:
        return struct.pack("HBBI", code, true, false, value)

    def answer(value: int) -> bytes:
        return struct.pack("HBBI", 0x06, 0, 0, value)

    equal, at_least, any_bit = 0x15, 0x35, 0x45
    denied = [number for name, number in numbers.items() if name not in {"clone", "clone3"}]
    program = [load(4), jump(equal, architecture, 1, 0), answer(_KILL), load(0)]
    program += [jump(at_least, 0x40000000, 0, 1), answer(_KILL)]  # the x32 numbers are another set of doors
    for number in denied:
        program += [jump(equal, number, 0, 1), answer(_DENY)]
    program += [jump(equal, numbers["clone3"], 0, 1), answer(_ABSENT)]  # its flags are behind a pointer; the C library falls back to clone
    program += [jump(equal, numbers["clone"], 0, 3), load(16), jump(any_bit, _NAMESPACES, 0, 1), answer(_DENY)]
    return [*program, answer(_ALLOW)]
