"""What the system refuses is said plainly: what was tried, why it failed, and what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from reconciler import files
from reconciler.core.errors import DiskFull, StoreError


def translated(error: OSError, on: Path | None = None) -> StoreError:
    with pytest.raises(StoreError) as found, files.translate_errors("write it", on):
        raise error
    return found.value


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.ENOSPC, DiskFull, "gc --dry-run"), (errno.EDQUOT, DiskFull, "quota -s"), (errno.EFBIG, StoreError, "ulimit -f"),
        (errno.EROFS, StoreError, "dmesg"), (errno.EIO, StoreError, "smartctl"), (errno.EACCES, StoreError, "ls -l"),
        (errno.EISDIR, StoreError, "move it away"), (errno.ENAMETOOLONG, StoreError, ""),
    ],
)  # fmt: skip
def test_each_refusal_says_why_and_what_to_do(number: int, kind: type[StoreError], hint: str) -> None:
    error = translated(OSError(number, os.strerror(number)))

    assert type(error) is kind
    assert error.message == f"cannot write it: {os.strerror(number)}"
    assert hint in error.hint


def test_a_file_system_without_inodes_is_told_from_one_without_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_files=1000, f_favail=0))
    refused = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "missing" / "file"))

    assert "no inodes are left" in translated(refused).message
    assert "df -i" in translated(OSError(errno.ENOSPC, "No space left on device", "relative"), tmp_path).hint


@pytest.mark.parametrize("counted", [(0, 0), (1000, 1)])
def test_one_that_counts_no_inodes_or_has_some_lacks_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: tuple[int, int]
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_files=counted[0], f_favail=counted[1]))

    assert translated(OSError(errno.ENOSPC, "No space left on device", str(tmp_path))).message == "cannot write it: No space left on device"


@pytest.mark.parametrize("name", ["relative", None, 7, b"relative"])
def test_an_error_without_a_place_is_one_of_space(name: object) -> None:
    assert "inodes" not in translated(OSError(errno.ENOSPC, "No space left on device", name)).message


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("[Errno 28] No space left on device", errno.ENOSPC), ("the file cannot be made (cause: Read-only file system)", errno.EROFS),
        ("File too large", errno.EFBIG), ("[Errno 122] Disk quota exceeded", errno.EDQUOT), ("Connection refused", None), ("", None),
    ],
)  # fmt: skip
def test_what_another_program_says_of_the_file_system_is_understood(text: str, number: int | None) -> None:
    found = files.refusal_in(text)

    assert (found.errno if found else None) == number


def test_a_file_system_that_takes_a_page_refuses_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    assert files.refusal(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_one_that_takes_none_says_why(tmp_path: Path) -> None:
    found = files.refusal(tmp_path / "missing")

    assert found is not None
    assert found.errno == errno.ENOENT


def test_a_file_that_stands_at_the_probes_name_is_neither_written_nor_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reconciler.files.os.urandom", bytes)
    planted = tmp_path / f".probe.{bytes(6).hex()}.tmp"
    planted.write_bytes(b"somebody's")

    found = files.refusal(tmp_path)

    assert found is not None
    assert found.errno == errno.EEXIST
    assert planted.read_bytes() == b"somebody's"
