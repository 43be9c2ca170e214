"""What a child may read is the file that was opened, whatever its path leads to by the time that the child starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from reconciler.sandbox import choose, process
from reconciler.sandbox.process import Mode, SandboxJob
from tests.demand import working

MODES: tuple[Mode, ...] = ("bubblewrap", "landlock")


def descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_a_path_that_leads_elsewhere_after_it_was_opened_shows_nothing_new(
    mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = choose._sandbox(working(mode))
    start = type(box)._started

    def swapped(self: process.Sandbox, wanted: SandboxJob, given: dict[Path, int]) -> subprocess.Popen[bytes]:
        for path in given:
            path.rename(path.with_name("as-it-was"))
            path.write_text("planted")
        return start(self, wanted, given)

    monkeypatch.setattr(type(box), "_started", swapped)
    with choose._doors(tmp_path) as job:
        job |= {"namespaces": mode == "bubblewrap", "server": False}
        ended = box.run(SandboxJob(module="reconciler.sandbox.probe", job=job, seconds=30.0, read=(Path(job["canary"]),)))
    assert ended.word is not None
    assert ended.word["canary"] == (job["word"] if mode == "bubblewrap" else "")
    assert ended.word["open"] == []


@pytest.mark.parametrize("mode", MODES)
def test_no_descriptor_is_left_open_in_us(mode: Mode, tmp_path: Path) -> None:
    box = choose._sandbox(working(mode))
    (tmp_path / "model").write_text("x")
    job = {"way": "answer"}
    before = descriptors()
    tests = Path(__file__).resolve().parents[1]
    ended = box.run(SandboxJob(module="tests.children.misbehave", job=job, seconds=30.0, read=(tests, tmp_path / "model")))
    assert ended.word is not None
    assert descriptors() == before
