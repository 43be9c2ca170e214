"""Bytes and their names: what a test serves, packs and expects."""

from __future__ import annotations

import hashlib
import io
import tarfile
from typing import Any

import msgspec

from reconciler.core.errors import UnpackRefused

Files = dict[str, bytes]


def name_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def url_of(data: bytes) -> str:
    return f"https://models.example.org/{hashlib.sha256(data).hexdigest()}"


def tar(files: Files) -> bytes:
    """Return a tar of *files* that is always the same."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def tar_members(data: bytes) -> Files:
    """Return the files in a tar; refuse any other member."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {}
        for member in archive.getmembers():
            if not member.isreg():
                raise UnpackRefused(f"{member.name} is no plain file")
            file = archive.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
        return found


def changed(value: Any, **changes: Any) -> Any:
    """Return a struct with some fields changed."""
    return msgspec.structs.replace(value, **changes)
