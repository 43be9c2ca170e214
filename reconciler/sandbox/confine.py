"""
What the child does to itself before it runs its job: resource limits, a seccomp filter and, without namespaces, Landlock.

Rules that hold here:

1. The process cannot undo any of it (``PR_SET_NO_NEW_PRIVS``; seccomp(2), landlock(7)).
2. Whatever cannot be set up ends the child at once with ``SETUP_FAILED``, before any of its input is read.
3. Once all is set up the child writes ``CONFINED``, before any code of its job runs. So its parent knows a sandbox that failed from a job
   that did.
4. Everything is done with ``ctypes`` and ``prctl``, without a dependency.
5. A server without namespaces (*bare*) shares the machine's network: Landlock lets it bind one TCP port and connect to nothing, and the
   filter takes away every other way out. It can leave neither its process group nor its session, so that all of it can be killed.

Run as ``python -I -c BOOTSTRAP SETUP``: *SETUP* is a JSON document, and standard input is the job's. Run as a file it turns into a bare
server (``start_server``): by then no package can be looked for, since the folder above this one cannot be read.

Longer than 400 lines because what confines one child is read in one place, with the numbers of two machines' system calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import platform
import resource
import signal
import stat
import struct
import sys
from pathlib import Path
from typing import Any

#: Exit code of a child that could not confine itself.
SETUP_FAILED = 97

#: The first line of a child's standard output, once it is confined.
CONFINED = b"confined\n"

#: Argument of ``python -I -c``. The second argument is this package's folder: an isolated interpreter does not find a checkout otherwise.
BOOTSTRAP = f"import sys; sys.path.insert(0, sys.argv[2]); import {__name__} as confine; confine.main(sys.argv[1])"

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_DUMPABLE = 1, 38, 22, 4
_SECCOMP_MODE_FILTER = 2
_CAPABILITIES_V3 = 0x20080522
_KEPT_CAPABILITIES = (
    0b110  # DAC_OVERRIDE and DAC_READ_SEARCH: Landlock limits these to the files that it allows; it does not limit root's others
)

#: (audit architecture, system call numbers) by machine; asm/unistd.h of each.
_MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (0xC000003E, {
        "shmget": 29, "shmat": 30, "shmctl": 31, "socket": 41, "connect": 42, "socketpair": 53, "clone": 56, "fork": 57, "vfork": 58,
        "execve": 59, "kill": 62, "semget": 64, "semop": 65, "semctl": 66, "msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71,
        "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "ptrace": 101, "syslog": 103, "setpgid": 109, "setsid": 112,
        "rt_sigqueueinfo": 129,
        "utime": 132, "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144, "pivot_root": 155, "chroot": 161,
        "mount": 165, "umount2": 166, "reboot": 169, "init_module": 175, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190,
        "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "tkill": 200, "sched_setaffinity": 203, "semtimedop": 220,
        "tgkill": 234, "utimes": 235, "mq_open": 240, "mq_unlink": 241, "kexec_load": 246, "add_key": 248, "request_key": 249,
        "keyctl": 250, "ioprio_set": 251, "fchownat": 260, "futimesat": 261, "fchmodat": 268, "unshare": 272, "utimensat": 280,
        "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "prlimit64": 302, "open_by_handle_at": 304, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313, "sched_setattr": 314, "bpf": 321, "execveat": 322,
        "userfaultfd": 323, "pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438,
        "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466,
    }),
    "aarch64": (0xC00000B7, {
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "ioprio_set": 30,
        "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55,
        "utimensat": 88, "unshare": 97, "kexec_load": 104, "init_module": 105, "syslog": 116, "ptrace": 117, "sched_setparam": 118,
        "sched_setscheduler": 119, "sched_setaffinity": 122, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138,
        "setpriority": 140, "reboot": 142, "setpgid": 154, "setsid": 157, "mq_open": 180, "mq_unlink": 181, "msgget": 186, "msgctl": 187,
        "msgrcv": 188, "msgsnd": 189, "semget": 190, "semctl": 191, "semtimedop": 192, "semop": 193, "shmget": 194, "shmctl": 195,
        "shmat": 196, "socket": 198, "socketpair": 199, "connect": 203, "add_key": 217, "request_key": 218, "keyctl": 219, "clone": 220,
        "execve": 221, "rt_tgsigqueueinfo": 240, "perf_event_open": 241, "prlimit64": 261, "open_by_handle_at": 265, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "finit_module": 273, "sched_setattr": 274, "bpf": 280, "execveat": 281,
        "userfaultfd": 282, "pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438,
        "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466,
    }),
}  # fmt: skip
#: Allowed besides in a sandbox for a server, which starts it and connects to it; only namespaces make that safe. ``socketpair`` is denied
#: in all others: its datagram kind sends to any address (unix(7)), and so out of a sandbox without namespaces. CUDA fails without
#: memfd_create(2) and the naming of threads; both are allowed.
_SERVER_CALLS = {"socketpair", "connect", "fork", "vfork", "execve", "execveat", "kill", "tgkill", "tkill", "prlimit64"}
_SERVER_CALLS |= {"sched_setaffinity", "sched_setscheduler", "sched_setparam", "setpriority", "setsid", "setpgid"}
_SERVER_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_NETLINK = 16  # AF_NETLINK; protocol 0 is NETLINK_ROUTE
_ROUTE_KINDS = tuple(kind | flags for kind in (2, 3) for flags in (0, 0x800, 0x80000, 0x80800))  # SOCK_DGRAM, SOCK_RAW
#: What a server keeps of these without namespaces. Signals only where Landlock bounds them. No other process's limits or processors.
_BARE_SERVER_CALLS = {"connect", "fork", "vfork", "execve", "execveat"}
_SIGNALS = {"kill", "tgkill", "tkill"}
#: A server without namespaces has TCP alone, which Landlock restricts. Datagrams, MPTCP and pathname sockets of AF_UNIX it does not govern.
_TCP_FAMILIES, _TCP_PROTOCOLS = (2, 10), (0, 6)
_STREAMS = (1, 0x801, 0x80001, 0x80801)  # SOCK_STREAM, with SOCK_NONBLOCK, SOCK_CLOEXEC or both
#: These calls connect on their own with MSG_FASTOPEN, past Landlock: their numbers by machine, and which argument has the flags.
_SENDING = {"x86_64": {44: 3, 46: 2, 307: 3}, "aarch64": {206: 3, 211: 2, 269: 3}}
_FASTOPEN = 0x20000000
_DESCRIPTORS = 65_536
_THREAD = 0x00010000  # CLONE_THREAD
_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
_ALLOW, _DENY, _ABSENT, _KILL = 0x7FFF0000, 0x00050000 | 13, 0x00050000 | 38, 0x80000000  # EACCES, ENOSYS
_NOTHING = 0x00050000  # the call does nothing and returns 0

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LEAST_LANDLOCK = 3  # before it, truncate(2) was not governed
LANDLOCK_TCP = 4  #: The first version that restricts TCP.
_LANDLOCK_SCOPES = 6  # the first that keeps signals and abstract sockets inside
_PATH_RULE, _NET_RULE, _BIND_TCP, _CONNECT_TCP, _SCOPES = 1, 2, 1, 2, 0b11
_SOCKET_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # rights known to a version; 16 from the fifth on
_READ_FILE, _WRITE_FILE, _READ_DIR, _EXECUTE, _TRUNCATE, _IOCTL = 1 << 2, 1 << 1, 1 << 3, 1 << 0, 1 << 14, 1 << 15


class SetupFailed(Exception):
    """The child could not confine itself."""


def main(setup: str) -> None:
    """Confine this process as the JSON document *setup* says, import the job's module, and run its ``main``."""
    try:
        wanted = json.loads(setup)
        sys.path += [folder for folder in wanted["packages"] if folder not in sys.path]
        confine(wanted)
        module = importlib.import_module(wanted["module"])  # a failed import is not the fault of what it would have read
    except Exception as error:  # noqa: BLE001  whatever failed, the job must not run
        sys.stderr.write(f"the sandbox could not be set up: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(SETUP_FAILED)
    os.write(1, CONFINED)
    module.main()


#: Descriptors of the kernel's tables of TCP sockets, of a bare server's worker; they tell whose socket listens on the port.
SOCKET_TABLES: list[int] = []


def confine(wanted: dict[str, Any]) -> None:
    """
    Set up the signal for the parent's death, limits, Landlock if *wanted*, and the filter. In this order: each could forbid the one before.

    Raises:
        SetupFailed, OSError: something could not be set up; the process may be half confined and MUST end.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    bare = bool(wanted["server"] and wanted["landlock"])
    if bare:  # what the server has started is not this process's child, and must end with it
        signal.signal(signal.SIGTERM, lambda *_: os.kill(0, signal.SIGKILL))
    _end_with_parent(libc, wanted["parent"], signal.SIGTERM if bare else signal.SIGKILL)
    with contextlib.suppress(OSError):  # no protection, but when memory runs out the kernel ends this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    _limit(wanted["limits"])
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call(libc.prctl, _PR_SET_DUMPABLE, 0, 0, 0, 0)
    _drop_capabilities(libc)
    if bare:
        SOCKET_TABLES.extend(os.open(table, os.O_RDONLY | os.O_CLOEXEC) for table in _SOCKET_TABLES if Path(table).exists())
    if wanted["landlock"]:
        _landlock(libc, wanted["read"], wanted["given"], wanted["write"], wanted["devices"], wanted["port"] if bare else 0)
    _close_all_but(SOCKET_TABLES)
    _seccomp(libc, server=wanted["server"], writes=bool(wanted["writes"]), bare=bare)


def _end_with_parent(libc: Any, parent: int, number: int) -> None:
    _call(libc.prctl, _PR_SET_PDEATHSIG, number, 0, 0, 0)
    if parent and os.getppid() != parent:
        raise SetupFailed("the parent is gone")


def _close_all_but(kept: list[int]) -> None:
    """Close every other descriptor but the standard ones: the parent may have leaked one."""
    first = 3
    for fd in sorted(kept):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, _DESCRIPTORS)


def server_command(argv: list[str]) -> list[str]:
    """Return the command that confines a process further, by ``start_server``, and turns it into *argv*. For a bare server."""
    return [sys.executable, "-I", "-B", __file__, json.dumps({"argv": argv, "parent": os.getpid()})]


def start_server(setup: str) -> None:
    """Forbid this process every connection, and signals to its parent; let it end with its parent; and turn it into the server."""
    wanted = json.loads(setup)
    libc = ctypes.CDLL(None, use_errno=True)
    _end_with_parent(libc, wanted["parent"], signal.SIGKILL)
    version = landlock_version()
    attributes = struct.pack("QQQ", 0, _CONNECT_TCP, _SCOPES if version >= _LANDLOCK_SCOPES else 0)
    ruleset = _ruleset(libc, attributes[: _ruleset_size(version)])
    _restrict(libc, ruleset)
    os.execv(wanted["argv"][0], wanted["argv"])  # noqa: S606  no shell is in between


def _drop_capabilities(libc: Any) -> None:
    """Drop every capability but those over files; in a namespace none is left to drop."""
    header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
    held = ctypes.create_string_buffer(24)
    if libc.capget(header, held):
        raise SetupFailed(f"capabilities: {os.strerror(ctypes.get_errno())}")
    kept = struct.unpack("=6I", held.raw)[1] & _KEPT_CAPABILITIES
    if libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)):
        raise SetupFailed(f"capabilities: {os.strerror(ctypes.get_errno())}")


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
    """Return the kernel's Landlock version, 0 where it has none. The system call tells, not the kernel's release."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(0, int(found))


def no_tcp_rules() -> str:
    """Return why this kernel's Landlock cannot confine a server, or an empty text."""
    version = landlock_version()
    if version >= LANDLOCK_TCP:
        return ""
    has = f"its Landlock is version {version}, and {LANDLOCK_TCP} is needed" if version else "it has no Landlock"
    return f"this kernel cannot restrict a server's TCP connections: {has}"


def _landlock(libc: Any, read: list[str], given: list[int], write: list[str], devices: list[str], port: int) -> None:
    """Restrict this process to what is named; *port*: it may listen on and connect to this TCP port, and execute what it may read."""
    version = landlock_version()
    if version < _LEAST_LANDLOCK:
        raise SetupFailed(f"Landlock {version} is too old, {_LEAST_LANDLOCK} is needed" if version else "the kernel has no Landlock")
    if port and (why := no_tcp_rules()):
        raise SetupFailed(why)
    rights = (1 << _FS_BITS.get(version, 16)) - 1
    scopes = _SCOPES if version >= _LANDLOCK_SCOPES else 0
    attributes = struct.pack("QQQ", rights, _BIND_TCP | _CONNECT_TCP if version >= LANDLOCK_TCP else 0, scopes)
    ruleset = _ruleset(libc, attributes[: _ruleset_size(version)])
    reading = _READ_FILE | _READ_DIR | (_EXECUTE if port else 0)
    for path in read:
        _allow(libc, ruleset, path, reading)
    for fd in given:
        _rule(libc, ruleset, fd, reading)
    for path in write:
        _allow(libc, ruleset, path, rights & ~_EXECUTE)
    for path in devices:
        _allow(libc, ruleset, path, (_READ_FILE | _WRITE_FILE | _READ_DIR | _IOCTL) & rights)
    if port:
        _add(libc, ruleset, _NET_RULE, struct.pack("=QQ", _BIND_TCP | _CONNECT_TCP, port))
    _restrict(libc, ruleset)


def _ruleset_size(version: int) -> int:
    return 24 if version >= _LANDLOCK_SCOPES else 16 if version >= LANDLOCK_TCP else 8


def _ruleset(libc: Any, attributes: bytes) -> int:
    found = libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if found < 0:
        raise SetupFailed(f"Landlock: {os.strerror(ctypes.get_errno())}")
    return int(found)


def _restrict(libc: Any, ruleset: int) -> None:
    if libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT), ctypes.c_int(ruleset), ctypes.c_uint32(0)):
        raise SetupFailed(f"Landlock: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


def _allow(libc: Any, ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _rule(libc, ruleset, fd, rights)
    finally:
        os.close(fd)


def _rule(libc: Any, ruleset: int, fd: int, rights: int) -> None:
    """Allow access to what *fd* names: that file or folder, whatever its path leads to later."""
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        rights &= _READ_FILE | _WRITE_FILE | _EXECUTE | _TRUNCATE | _IOCTL
    _add(libc, ruleset, _PATH_RULE, struct.pack("=Qi", rights, fd))


def _add(libc: Any, ruleset: int, kind: int, rule: bytes) -> None:
    if libc.syscall(ctypes.c_long(_LANDLOCK_ADD), ctypes.c_int(ruleset), ctypes.c_int(kind), rule, ctypes.c_uint32(0)):
        raise SetupFailed(f"Landlock: {os.strerror(ctypes.get_errno())}")


# -- seccomp ---------------------------------------------------------------------------------------


def _seccomp(libc: Any, *, server: bool, writes: bool, bare: bool = False) -> None:
    """
    Deny sockets, new programs and processes, namespaces, access to other processes, and calls into the kernel's internals.

    Changes of mode, owner, times and attributes too: Landlock does not govern them, and the model's file is the store's own. Without
    namespaces a child that could start processes would leave them behind when it is killed.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        raise SetupFailed(f"no system call filter is known for {machine}")
    scoped = landlock_version() >= _LANDLOCK_SCOPES
    program = b"".join(_bare_filter(machine, scoped=scoped) if bare else _filter(*_MACHINES[machine], server=server, writes=writes))
    buffer = ctypes.create_string_buffer(program)
    pointer = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    keep = ctypes.create_string_buffer(pointer)
    _call(libc.prctl, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(keep), 0, 0)


_Bounds = tuple[tuple[int, tuple[int, ...]], ...]


def _filter(architecture: int, numbers: dict[str, int], *, server: bool, writes: bool) -> list[bytes]:
    """Return classic BPF (linux/filter.h) over struct seccomp_data: number at 0, architecture at 4, arguments from 16 on."""
    own = (os.getpid(),)
    bounded: dict[str, _Bounds] = {"tgkill": ((0, own),), "prlimit64": ((0, (0, *own)),)}  # abort(3) signals itself
    if writes:
        bounded["fchmod"] = ((1, (0o444, 0o755)),)  # of unpacked files, by descriptor
    if server:
        bounded["socket"] = ((0, _SERVER_FAMILIES),)
    first = _own_interfaces(numbers["socket"]) if server else []
    return _program(architecture, numbers, _SERVER_CALLS if server else set(), bounded, threads_only=not server, first=first)


def _own_interfaces(socket: int) -> list[bytes]:
    """Allow a socket that lists the interfaces of the namespace (getifaddrs(3)), which has its loopback alone; no other of that family."""
    asked = [_load(24), *(_jump(_EQUAL, kind, len(_ROUTE_KINDS) - 1 - index, 0) for index, kind in enumerate(_ROUTE_KINDS[:-1]))]
    asked += [_jump(_EQUAL, _ROUTE_KINDS[-1], 0, 3), _load(32), _jump(_EQUAL, 0, 0, 1), _answer(_ALLOW)]
    body = [_load(16), _jump(_EQUAL, _NETLINK, 0, len(asked)), *asked, _load(0)]
    return [_jump(_EQUAL, socket, 0, len(body)), *body]


def _bare_filter(machine: str, *, scoped: bool) -> list[bytes]:
    """Return the filter for a server without namespaces; *scoped*: Landlock keeps its signals inside."""
    own, itself = (os.getpid(),), ((0, (0,)),)
    bounded: dict[str, _Bounds] = {
        "socket": ((0, _TCP_FAMILIES), (1, _STREAMS), (2, _TCP_PROTOCOLS)), "socketpair": ((1, _STREAMS),),
        "prlimit64": ((0, (0, *own)),), "sched_setaffinity": itself, "sched_setscheduler": itself, "sched_setparam": itself,
        "setpriority": ((1, (0,)),), "tgkill": ((0, own),), "kill": itself,
    }  # fmt: skip
    allowed = _BARE_SERVER_CALLS | (_SIGNALS if scoped else set())
    architecture, numbers = _MACHINES[machine]
    first = [_jump(_EQUAL, numbers["setsid"], 1, 0), _jump(_EQUAL, numbers["setpgid"], 0, 1), _answer(_NOTHING)]
    for number, argument in _SENDING[machine].items():
        first += [_jump(_EQUAL, number, 0, 4), _load(16 + 8 * argument), _jump(_ANY_BIT, _FASTOPEN, 0, 1), _answer(_DENY), _answer(_ALLOW)]
    return _program(architecture, numbers, allowed, bounded, threads_only=False, first=first)


def _program(
    architecture: int, numbers: dict[str, int], allowed: set[str], bounded: dict[str, _Bounds], *, threads_only: bool, first: Any = ()
) -> list[bytes]:
    program = [_load(4), _jump(_EQUAL, architecture, 1, 0), _answer(_KILL), _load(0)]
    program += [_jump(_AT_LEAST, 0x40000000, 0, 1), _answer(_KILL)]  # the x32 numbers name the same calls again
    program += first
    for name, number in numbers.items():
        if name in allowed or name in {"clone", "clone3"}:
            continue
        program += _bounded(number, *bounded[name]) if name in bounded else [_jump(_EQUAL, number, 0, 1), _answer(_DENY)]
    program += [
        _jump(_EQUAL, numbers["clone3"], 0, 1),
        _answer(_ABSENT),
    ]  # a filter cannot read its flags, which are behind a pointer; callers fall back to clone
    threads = [_jump(_ANY_BIT, _THREAD, 1, 0), _answer(_DENY)] if threads_only else []
    program += [_jump(_EQUAL, numbers["clone"], 0, 3 + len(threads))]
    program += [_load(16), _jump(_ANY_BIT, _NAMESPACES, 0, 1), _answer(_DENY), *threads]
    return [*program, _answer(_ALLOW)]


_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45


def _load(offset: int) -> bytes:
    return struct.pack("HBBI", 0x20, 0, 0, offset)


def _jump(code: int, value: int, true: int, false: int) -> bytes:
    return struct.pack("HBBI", code, true, false, value)


def _answer(value: int) -> bytes:
    return struct.pack("HBBI", 0x06, 0, 0, value)


def _bounded(number: int, *bounds: tuple[int, tuple[int, ...]]) -> list[bytes]:
    """
    Allow the call *number* only if each of the arguments that *bounds* names is one of its values.

    Both this filter and the kernel read 32 bits of such an argument.
    """
    body: list[bytes] = []
    for argument, values in bounds:
        body += [_load(16 + 8 * argument)]
        body += [_jump(_EQUAL, value, len(values) - index, 0) for index, value in enumerate(values)]
        body += [_answer(_DENY)]
    return [_jump(_EQUAL, number, 0, len(body) + 1), *body, _answer(_ALLOW)]


if __name__ == "__main__":
    start_server(sys.argv[1])
