"""The agent's log, and what is said of downloads while they run."""

from __future__ import annotations

import io
import json
import time
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from reconciler.core.events import BlobReady, Event, FetchProgress, Incident, ModelDone, Notice, RunEnded, RunStarted, Swapped
from reconciler.report import log_lines, terminal
from reconciler.report.log_lines import LogFormat, LogLines
from reconciler.report.totals import LineTimer, Totals

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
GIB = 1 << 30
STARTED = RunStarted(lock="sha256:" + "0" * 64, generation=1, models=3, download_bytes=0)
IDLE = RunEnded(lock="sha256:" + "0" * 64, generation=1, active=3, failed=0, changed=False, seconds=0.1)


class Log:
    """A log whose clock the test moves."""

    def __init__(self, form: LogFormat = "text", *, quiet: bool = False) -> None:
        self.now = NOW
        self._out = io.StringIO()
        self.report = LogLines(self._out, form, lambda: self.now, quiet=quiet)

    def after(self, *events: Event) -> list[str]:
        before = self._out.tell()
        for event in events:
            self.report(event)
        return self._out.getvalue()[before:].splitlines()


def test_a_day_of_cycles_that_change_nothing_is_one_line() -> None:
    log = Log()
    lines = []
    for _ in range(12 * 24):
        lines += log.after(STARTED, IDLE)
        log.now += timedelta(minutes=5)
    assert len(lines) == 1
    assert "nothing to do: 3 active" in lines[0]
    assert len(log.after(STARTED, IDLE)) == 1, "and one each day"


def test_what_a_run_does_is_told_with_its_beginning() -> None:
    log = Log()
    done = ModelDone(model="a:v1", state="active", reason="not-installed: tested")
    lines = log.after(STARTED, Swapped(generation=2, added=("a:v1",)), done, msgspec_changed(IDLE))
    assert ["applying lock" in lines[0], "generation 2" in lines[1], "a:v1: active" in lines[2], "done" in lines[3]] == [True] * 4


def msgspec_changed(event: RunEnded) -> RunEnded:
    import msgspec

    return msgspec.structs.replace(event, changed=True)


def test_a_failure_is_told_each_time() -> None:
    log = Log(quiet=True)
    warning = Notice(level="warning", text="the network does not answer")
    failed = ModelDone(model="a:v1", state="failed", reason="smoke-failed: x")
    for _ in range(3):
        assert len(log.after(STARTED, warning, failed, Incident(kind="smoke-failed", model="a:v1"), IDLE)) >= 3


@pytest.mark.parametrize(
    ("event", "level", "priority"),
    [
        (Notice(level="info", text="x"), "info", "<6>"), (Notice(level="warning", text="x"), "warning", "<4>"),
        (ModelDone(model="a:v1", state="failed"), "error", "<3>"), (Incident(kind="rollback"), "error", "<3>"),
        (Incident(kind="incompatible"), "warning", "<4>"), (Swapped(generation=2), "info", "<6>"),
    ],
)  # fmt: skip
def test_each_line_has_its_time_and_level(event: Event, level: str, priority: str) -> None:
    (text,) = Log("text").after(event)
    assert text.startswith(f"2026-11-20T12:00:00Z {level} ")
    (journal,) = Log("journald").after(event)
    assert journal.startswith(priority)
    assert "2026" not in journal, "the journal has its own time"
    (line,) = Log("json").after(event)
    found = json.loads(line)
    assert (found["at"], found["level"], bool(found["message"])) == ("2026-11-20T12:00:00Z", level, True)
    assert found["type"]


def test_a_hostile_text_forges_no_line() -> None:
    forged = "x\n2026-11-20T12:00:00Z info forged\x1b[31m"
    forms: tuple[LogFormat, ...] = ("text", "journald", "json")
    for form in forms:
        assert len(Log(form).after(Incident(kind="rollback", detail=forged))) == 1


def test_a_log_that_cannot_be_written_ends_no_run() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    report = log_lines.LogLines(Full(), "text", lambda: NOW)
    report(Swapped(generation=2))
    report(Swapped(generation=3))
    assert report.failure is not None


# -- downloads


def progress(digest: str, done: int, total: int, **more: int) -> FetchProgress:
    return FetchProgress(digest=digest, done=done, total=total, source="https://models.example.org/x", **more)


def test_totals_are_of_all_downloads_of_the_plan() -> None:
    totals = Totals()
    for event in (
        RunStarted(lock="", generation=0, models=2, download_bytes=10 * GIB),
        progress("a", GIB, 4 * GIB, rate=GIB // 2),
        progress("b", 2 * GIB, 6 * GIB, rate=GIB // 2, resumed=GIB),
    ):
        totals.update(event)
    assert totals.text == "3.0 GiB of 10.0 GiB, 30 %, 1.0 GiB/s, 7.0s left, 1.0 GiB of it from an earlier run"
    totals.update(BlobReady(digest="b", size=6 * GIB))
    assert totals.text.startswith("7.0 GiB of 10.0 GiB, 70 %, 512.0 MiB/s, 6.0s left")


def test_a_log_gets_a_line_each_ten_seconds_or_five_percent_and_never_two_in_a_second() -> None:
    def lines(rate: float, seconds: float) -> int:
        totals, timer = Totals(), LineTimer()
        totals.update(RunStarted(lock="", generation=0, models=1, download_bytes=100 * GIB))
        count = 0
        for tick in range(int(seconds * 4)):
            totals.update(progress("a", int(min(100 * GIB, rate * tick / 4)), 100 * GIB))
            count += timer.is_due(totals, tick / 4)
        return count

    assert lines(GIB / 10, 100) == 9, "slowly: each ten seconds"
    assert lines(GIB, 100) == 19, "at one percent a second: each five"
    assert lines(50 * GIB, 2) <= 2, "at once: hardly any"
    assert lines(0, 100) == 9, "and when nothing comes, too"


def test_a_slow_download_is_told_of_off_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter(range(0, 1000, 3))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    report = terminal.EventLines(terminal.console(stderr=False, color=False))
    report(RunStarted(lock="", generation=0, models=1, download_bytes=GIB))
    for part in range(20):
        report(progress("sha256:" + "a" * 64, part * GIB // 2000, GIB, rate=1000))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("downloading: ")]
    assert len(lines) == 4
    assert "of 1.0 GiB" in lines[0]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_bytes_rate_and_time_left_are_shown_at_any_width(width: int) -> None:
    seen = io.StringIO()
    with terminal.ProgressBars(Console(file=seen, force_terminal=True, width=width)) as people:
        people(RunStarted(lock="", generation=0, models=2, download_bytes=10 * GIB))
        people(progress("sha256:" + "a" * 64, GIB, 4 * GIB, rate=100 << 20))
        people(progress("sha256:" + "b" * 64, GIB, 6 * GIB, rate=100 << 20))
        people._progress.refresh()
    shown = seen.getvalue()
    assert "1.0 GiB of 4.0 GiB  100.0 MiB/s  31s left" in shown
    assert "2.0 GiB of 10.0 GiB, 20 %" in shown
