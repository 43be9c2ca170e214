"""Unpacking in the sandbox: the extractor runs as a child that may read one archive and write one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from reconciler.core.errors import DiskFull, ReconcileError, SandboxUnavailable, StoreError, UnpackRefused
from reconciler.core.node import Limits
from reconciler.sandbox import choose
from reconciler.sandbox.process import SandboxJob
from reconciler.sandbox.supervision import OWN_FAULT, ProcessResult, printable

_MODULE = "reconciler.unpack.extract"
_LEAST_SECONDS = 120.0
#: An archive that extracts more slowly than this was made to do so.
_BYTES_A_SECOND = 5 << 20
#: A hundred thousand members with long paths.
_ANSWER_BYTES = 64 << 20
#: Windows of decompressors and the names of members.
_MEMORY_BYTES = 2 << 30
_NAMES: dict[str, type[ReconcileError]] = {"unpack-refused": UnpackRefused, "store": StoreError, "disk-full": DiskFull}

_Text = Annotated[str, Meta(max_length=4096)]


class _Failure(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Literal["unpack-refused", "store", "disk-full", "usage"]
    message: _Text
    hint: _Text = ""


class _Answer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An extractor's answer: its members or its error. An answer with anything else in it is refused whole."""

    nonce: str
    members: tuple[str, ...] | None = None
    error: _Failure | None = None


class SandboxedUnpacker:
    """Unpacks archives in a sandbox; where none works, archives stay packed. *cache* keeps what a probe of the sandboxes found."""

    def __init__(self, cache: Path, sandbox: choose.SandboxSetting, limits: Limits | None = None) -> None:
        self._cache = cache
        self._sandbox = sandbox
        self._limits = limits or Limits()

    def unpack(self, archive: Path, kind: str, into: Path) -> tuple[str, ...]:
        """
        Unpack *archive* *into* an empty folder; return the members' relative paths, sorted.

        Raises:
            UnpackRefused: the archive breaks a rule, or its extractor died or did not end in time.
            SandboxUnavailable: no sandbox works here.
            StoreError: the disk refused.
        """
        box = choose.choose(self._sandbox, self._cache)
        size = archive.stat().st_size
        job: dict[str, Any] = {
            "archive": str(archive.resolve()), "kind": kind, "into": str(into.resolve()), "limits": msgspec.to_builtins(self._limits),
        }  # fmt: skip
        ended = box.run(
            SandboxJob(
                module=_MODULE,
                job=job,
                seconds=_LEAST_SECONDS + size / _BYTES_A_SECOND,
                read=(archive.resolve(),),
                write=into.resolve(),
                file_bytes=self._limits.archive_bytes,
                memory_bytes=_MEMORY_BYTES,
                answer_bytes=_ANSWER_BYTES,
            )
        )
        if ended.setup_failed:
            choose.forget_probes(self._cache)
        return _members(ended)


def _members(ended: ProcessResult) -> tuple[str, ...]:
    if ended.setup_failed:
        raise SandboxUnavailable(printable(ended.errors.strip()[-300:]))
    if ended.valid_answer is None:
        raise _error_of(ended)
    try:
        word = msgspec.convert(ended.valid_answer, _Answer)
    except msgspec.ValidationError as error:
        raise UnpackRefused(f"its extractor's answer is malformed: {printable(str(error))}") from None
    if word.error:
        kind = _NAMES.get(word.error.name, UnpackRefused)
        raise kind(printable(word.error.message)[:1000], hint=printable(word.error.hint)[:1000])
    if word.members is None:
        raise UnpackRefused("its extractor reported neither members nor an error")
    return tuple(sorted(word.members))


def _error_of(ended: ProcessResult) -> ReconcileError:
    """Return why there is no answer: the archive is to blame, unless something else ended its extractor."""
    if ended.signal and ended.signal not in OWN_FAULT:
        return StoreError(f"the archive's extractor was killed by signal {ended.signal}, perhaps for want of memory")
    how = "did not end in time" if ended.timed_out else f"ended with {ended.code} and no answer"
    return UnpackRefused(f"its extractor {how}: {printable(ended.errors.strip()[-300:])}")
