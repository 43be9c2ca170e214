"""The process that unpacks: one job in, one answer out, whatever it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import archives
from tests.archives import member, tar


def ask(data: bytes) -> dict[str, Any]:
    """Run the process on *data*; return the one document that it prints."""
    done = subprocess.run([sys.executable, "-m", "reconciler.unpack.extract"], input=data, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert done.stdout.count(b"\n") == 1
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "into").mkdir()
    (tmp_path / "archive").write_bytes(archives.honest({"b/é": b"1", "a": b"2"}, "tar.zst"))
    return {"nonce": "n-1", "archive": str(tmp_path / "archive"), "kind": "tar.zst", "into": str(tmp_path / "into"), "limits": {}}


def test_a_job_is_done_and_answered_with_its_nonce(job: dict[str, Any]) -> None:
    assert ask(json.dumps(job).encode()) == {"nonce": "n-1", "members": ["a", "b/é"]}
    assert Path(job["into"], "b/é").read_bytes() == b"1"


def test_an_archive_of_nothing_is_answered_with_no_members(job: dict[str, Any]) -> None:
    Path(job["archive"]).write_bytes(tar())
    assert ask(json.dumps(job | {"kind": "tar"}).encode()) == {"nonce": "n-1", "members": []}


def test_a_refusal_is_an_answer_with_the_errors_name_and_the_nonce(job: dict[str, Any]) -> None:
    Path(job["archive"]).write_bytes(tar(member(b"../up", b"x")))
    answer = ask(json.dumps(job | {"kind": "tar"}).encode())
    assert answer["nonce"] == "n-1"
    assert answer["error"]["name"] == "unpack-refused"
    assert "../up" in answer["error"]["message"]
    assert "members" not in answer


def test_limits_come_with_the_job(job: dict[str, Any]) -> None:
    answer = ask(json.dumps(job | {"limits": {"archive_members": 1}}).encode())
    assert answer["error"]["name"] == "unpack-refused"


def test_what_the_disk_refuses_is_an_answer_too(job: dict[str, Any]) -> None:
    answer = ask(json.dumps(job | {"into": job["into"] + "/none"}).encode())
    assert answer["error"]["name"] == "store"


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"\xff", b'{"nonce":"n"}', b'{"nonce":1}', b"x" * (1 << 20), b"[" * 60_000],
    ids=["nothing", "empty", "list", "null", "no-text", "half", "number", "long", "deep"],
)
def test_what_is_no_job_is_refused_without_a_nonce(data: bytes) -> None:
    answer = ask(data)
    assert answer["nonce"] == ""
    assert answer["error"]["name"] == "usage"


@pytest.mark.parametrize("change", [{"kind": "rar"}, {"extra": 1}, {"archive": "a\0b"}, {"limits": {"archive_members": "many"}}])
def test_a_job_that_is_not_well_formed_is_refused(job: dict[str, Any], change: dict[str, Any]) -> None:
    answer = ask(json.dumps(job | change).encode())
    assert answer["error"]["name"] == "usage"
