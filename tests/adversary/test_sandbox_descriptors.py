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
    box = choose.make_sandbox(working(mode))
    start = type(box)._start

    def swapped(self: process.Sandbox, wanted: SandboxJob, given: dict[Path, int]) -> subprocess.Popen[bytes]:
        for path in given:
            path.rename(path.with_name("as-it-was"))
            path.write_text("planted")
        return start(self, wanted, given)

    monkeypatch.setattr(type(box), "_start", swapped)
    with choose._probe_targets(tmp_path) as job:
        job |= {"namespaces": mode == "bubblewrap", "server": False}
        ended = box.run(SandboxJob(module="reconciler.sandbox.probe", job=job, seconds=30.0, read=(Path(job["canary"]),)))
    assert ended.valid_answer is not None
    assert ended.valid_answer["canary"] == (job["canary_text"] if mode == "bubblewrap" else "")
    assert ended.valid_answer["succeeded"] == []


@pytest.mark.parametrize("mode", MODES)
def test_no_descriptor_is_left_open_in_us(mode: Mode, tmp_path: Path) -> None:
    box = choose.make_sandbox(working(mode))
    (tmp_path / "model").write_text("x")
    job = {"way": "answer"}
    before = descriptors()
    tests = Path(__file__).resolve().parents[1]
    ended = box.run(SandboxJob(module="tests.children.misbehave", job=job, seconds=30.0, read=(tests, tmp_path / "model")))
    assert ended.valid_answer is not None
    assert descriptors() == before
