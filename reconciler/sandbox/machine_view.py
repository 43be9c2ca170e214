"""
What a child sees of its machine in /proc, /sys and /etc.

Rules that hold here:

1. A server finds what it needs to start: how many processors there are and how they share caches and memory, names for itself and for
   its loopback interface, and the choices between alternative libraries and compilers.
2. Nothing there tells this machine from another of the same kind: no serial number, no address, no command line of the kernel, no list
   of disks or modules, no identifier of this boot.
3. The files in /etc are made here; no byte of the machine's own is in them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

#: What /proc says of the machine and no test job needs: drivers, disks, how the kernel was started, and what tells one boot from another.
HIDDEN = (
    "/proc/cmdline", "/proc/partitions", "/proc/diskstats", "/proc/mdstat", "/proc/swaps",
    "/proc/modules", "/proc/interrupts", "/proc/softirqs", "/proc/iomem", "/proc/ioports", "/proc/keys", "/proc/key-users",
    "/proc/crypto", "/proc/config.gz", "/proc/kallsyms", "/proc/timer_list", "/proc/sched_debug", "/proc/schedstat", "/proc/locks",
    "/proc/sys/kernel/random/boot_id",
)  # fmt: skip

#: Read without namespaces by a server, beside what every child reads there.
BARE_SERVER = ("/bin", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/node", "/etc/alternatives")

_CPU, _NODE = Path("/sys/devices/system/cpu"), Path("/sys/devices/system/node")
_CPU_FILES = ("online", "offline", "possible", "present", "isolated", "kernel_max")
_NODE_FILES = ("online", "possible", "has_cpu", "has_memory", "has_normal_memory")
_OF_A_NODE = ("cpulist", "cpumap", "distance", "meminfo", "hugepages")

_ETC = {
    "/etc/hosts": b"127.0.0.1 localhost sandbox\n::1 localhost\n",
    "/etc/nsswitch.conf": b"hosts: files\npasswd: files\ngroup: files\n",
    "/etc/passwd": b"sandbox:x:65534:65534:sandbox:/scratch:/bin/sh\n",
    "/etc/group": b"sandbox:x:65534:\n",
}


def processors() -> Iterator[Path]:
    """Yield the files and folders of /sys that say how many processors there are, and how they share caches and memory."""
    yield from (path for name in _CPU_FILES if (path := _CPU / name).exists())
    for one in sorted(_CPU.glob("cpu[0-9]*")):
        yield from (path for name in ("topology", "cache") if (path := one / name).is_dir())
    yield from (path for name in _NODE_FILES if (path := _NODE / name).exists())
    for one in sorted(_NODE.glob("node[0-9]*")):
        yield from (path for name in _OF_A_NODE if (path := one / name).exists())


@contextlib.contextmanager
def etc_files() -> Iterator[dict[str, int]]:
    """Give the files of a server's /etc, each as a descriptor of its text, by the path that it gets."""
    opened: dict[str, int] = {}
    try:
        for path, text in _ETC.items():
            opened[path] = fd = os.memfd_create(path, os.MFD_CLOEXEC)
            os.write(fd, text)
            os.lseek(fd, 0, os.SEEK_SET)
        yield opened
    finally:
        for fd in opened.values():
            os.close(fd)
