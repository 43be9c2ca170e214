"""
Signing with a key that this program never sees: a command that knows a hardware token, a cloud key or an HSM makes the signature.

Rules that hold here:

1. The command gets the bytes to be signed (the PAE) on standard input, and writes the signature to standard output: 64 bytes, or base64.
2. It is a list of words, run without a shell; standard error and the terminal are its own, for a PIN or a touch.
3. What it returns is believed by nobody: the caller checks it against the public key before anything is written.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import tempfile

from reconciler.core.errors import PublishError
from reconciler.publish import envelopes

#: A person may have to find a token, type a PIN and touch it.
_SECONDS = 300.0
_MOST_BYTES = 4096


class ExternalSigner:
    """The signer that the command line *command* stands for."""

    def __init__(self, command: str) -> None:
        try:
            self._argv = shlex.split(command)
        except ValueError as error:
            raise PublishError(f"the signer's command is not one: {error}") from None
        if not self._argv:
            raise PublishError("the signer's command is empty")

    def __call__(self, pae: bytes) -> bytes:
        """
        Return what the command answers to *pae* as a signature.

        Raises:
            PublishError: it cannot be run, fails, or does not end.
            BadSignature: what it writes is no signature.
        """
        with tempfile.TemporaryFile() as message:
            message.write(pae)
            message.seek(0)
            return envelopes.decode_signature(self._answer(message.fileno()))

    def _answer(self, message: int) -> bytes:
        try:
            process = subprocess.Popen(self._argv, stdin=message, stdout=subprocess.PIPE)
        except OSError as error:
            raise PublishError(f"the signer {self._argv[0]} cannot be run: {error.strerror}") from None
        with contextlib.ExitStack() as stack:
            stack.callback(process.kill)
            try:
                answer, _ = process.communicate(timeout=_SECONDS)
            except subprocess.TimeoutExpired:
                raise PublishError(f"the signer {self._argv[0]} did not end within {_SECONDS:.0f} s") from None
        if process.returncode:
            raise PublishError(f"the signer {self._argv[0]} ended with exit code {process.returncode}; nothing was signed")
        return answer[:_MOST_BYTES]
