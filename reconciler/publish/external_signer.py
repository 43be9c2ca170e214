"""
Signing with a key that this program never sees: a command that knows a hardware token, a cloud key or an HSM makes the signature.

Rules that hold here:

1. The command gets the bytes to be signed (the PAE) on standard input, and writes the signature to standard output: 64 bytes, or base64.
2. It is a list of words, run without a shell; standard error and the terminal are its own, for a PIN or a touch.
3. What it returns is believed by nobody: the caller checks it against the public key before anything is written.
4. It has a time, and all of its output that is read is bounded.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence

from reconciler.core.errors import PublishError
from reconciler.publish import envelopes

#: A person may have to find a token, type a PIN and touch it.
_SECONDS = 300.0
_MOST_BYTES = 4096


class ExternalSigner:
    """The signer that a command stands for, as a list of words."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = [*argv]

    @classmethod
    def from_command(cls, command: str) -> ExternalSigner:
        """
        Return the signer that the command line *command* stands for.

        Raises:
            PublishError: it is none.
        """
        try:
            argv = shlex.split(command)
        except ValueError as error:
            raise PublishError(f"the signer's command is not one: {error}") from None
        if not argv:
            raise PublishError("the signer's command is empty")
        return cls(argv)

    def __call__(self, pae: bytes) -> bytes:
        """
        Return what the command answers to *pae* as a signature.

        Raises:
            PublishError: it cannot be run, fails, or does not end.
            BadSignature: what it writes is no signature.
        """
        return envelopes.decode_signature(answer(self._argv, pae, "nothing was signed"))


def answer(argv: Sequence[str], given: bytes = b"", otherwise: str = "") -> bytes:
    """
    Return the first bytes of what the command *argv* writes, with *given* on its standard input.

    Raises:
        PublishError: it cannot be run, fails, or does not end; *otherwise* says what that means.
    """
    with tempfile.TemporaryFile() as message, contextlib.ExitStack() as stack:
        message.write(given)
        message.seek(0)
        try:
            process = stack.enter_context(subprocess.Popen(argv, stdin=message, stdout=subprocess.PIPE))
        except OSError as error:
            raise PublishError(f"the signer {argv[0]} cannot be run: {error.strerror}") from None
        stack.callback(process.kill)
        try:
            written = _read(process, time.monotonic() + _SECONDS)
        except subprocess.TimeoutExpired:
            raise PublishError(f"the signer {argv[0]} did not end within {_SECONDS:.0f} s; {otherwise}") from None
    if process.returncode and len(written) <= _MOST_BYTES:
        raise PublishError(f"the signer {argv[0]} ended with exit code {process.returncode}; {otherwise}")
    return written


def _read(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Return what *process* writes until it ends, or just more than the most that is read; raises TimeoutExpired after *deadline*."""
    assert process.stdout is not None
    found = b""
    while len(found) <= _MOST_BYTES:
        left = max(0.0, deadline - time.monotonic())
        if not select.select([process.stdout], [], [], left)[0]:
            raise subprocess.TimeoutExpired(process.args, left)
        if not (more := os.read(process.stdout.fileno(), _MOST_BYTES)):
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
            break
        found += more
    return found
