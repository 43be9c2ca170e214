"""Runs a command on a kernel without Landlock: its system calls answer that there are none (seccomp(2))."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

_ALLOW, _ABSENT = 0x7FFF0000, 0x00050026
_LANDLOCK = (444, 445, 446)


def main() -> None:
    program = [struct.pack("HBBI", 0x20, 0, 0, 0)]
    for number in _LANDLOCK:
        program += [struct.pack("HBBI", 0x15, 0, 1, number), struct.pack("HBBI", 0x06, 0, 0, _ABSENT)]
    code = b"".join([*program, struct.pack("HBBI", 0x06, 0, 0, _ALLOW)])
    buffer = ctypes.create_string_buffer(code)
    pointer = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.c_ulong(ctypes.addressof(pointer)), 0, 0) == 0
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
