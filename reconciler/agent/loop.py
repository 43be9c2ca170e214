"""
The agent: sync, scrub, tell, wait, for ever.

Rules that hold here:

1. One cycle after the other, in the main thread; a cycle that fails ends in a word and a sentence, never in the agent's end.
2. A store that another run holds is no failure: that run does the work. After a failure the wait doubles, up to an hour.
3. Telling (health file, metrics, systemd) never fails a cycle: what cannot be written is a warning.
4. Clock, timer, jitter, waiting and the work itself are given from outside, so that two hundred cycles take a test no time.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct

from reconciler.agent import systemd
from reconciler.commands import health_file
from reconciler.commands.health_file import Health, Phase, Word
from reconciler.commands.options import Clock, Options, wall_clock
from reconciler.core import units
from reconciler.core.errors import ReconcileError, StoreBusy, TrustError, UsageError
from reconciler.ports import Event, Notice, Reporter
from reconciler.report import metrics
from reconciler.report.metrics import Figures, RunFigures
from reconciler.settings import Settings
from reconciler.store import atomic

#: The longest wait after failures, unless the interval itself is longer.
BACKOFF_SECONDS = 3600.0
#: No interval is shorter: nothing here may spin.
SHORTEST_SECONDS = 1.0
#: Copying a large model to cold storage says nothing for so long; after that the watchdog's pulse ends.
SILENCE_SECONDS = 3600.0

_FAILURES = ("refused", "error")


class AgentOptions(Struct, frozen=True, kw_only=True):
    """What the command line says about the agent; None: as the settings say, or not at all."""

    interval_seconds: float | None = None
    metrics_file: Path | None = None
    metrics_port: int | None = None
    run: Options = Options()


class Ended(Struct, frozen=True, kw_only=True):
    """How one cycle ended; *error* is what ``--once`` raises."""

    outcome: Word
    message: str = ""
    at: datetime
    seconds: float
    error: Exception | None = None


class Wakeup(Protocol):
    """What wakes the agent."""

    def stops(self) -> bool:
        """Whether the agent was asked to end."""
        ...

    def reloads(self) -> bool:
        """Whether the settings are to be read anew."""
        ...

    def reloaded(self) -> None:
        """Forget the request that is answered now."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait, or be woken."""
        ...


class Work(Protocol):
    """What a cycle does."""

    def sync(self, settings: Settings, report: Reporter, options: Options) -> int:
        """Sync; return how many models failed."""
        ...

    def scrub(self, settings: Settings, report: Reporter, options: Options, delay_seconds: float) -> int:
        """Hash what is due and repair it; return how much was damaged."""
        ...

    def measure(self, settings: Settings) -> Figures:
        """Return the figures of now, but the run's."""
        ...


class Engine:
    """The work itself."""

    def sync(self, settings: Settings, report: Reporter, options: Options) -> int:
        """Hear the network and apply; return how many models failed."""
        from reconciler.commands import apply

        return len(apply.sync(settings, report, options, actor="agent").failed)

    def scrub(self, settings: Settings, report: Reporter, options: Options, delay_seconds: float) -> int:
        """Hash what is due and repair it; return how much was damaged."""
        from reconciler.agent import scrub

        return scrub.scrub(settings, report, options, delay_seconds=delay_seconds)

    def measure(self, settings: Settings) -> Figures:
        """Return the figures of now, but the run's."""
        from reconciler.commands import metrics_source

        return metrics_source.collect(settings)


def jitter_of_host() -> Callable[[float], float]:
    """Return what draws a jitter of at most so many seconds: another sequence on each host, the same on every start of one."""
    with contextlib.suppress(OSError):
        return _drawn(Path("/etc/machine-id").read_text().strip() + socket.gethostname())
    return _drawn(socket.gethostname())


def _drawn(seed: str) -> Callable[[float], float]:
    source = random.Random(seed)  # noqa: S311  nobody gains by guessing it
    return lambda most: source.uniform(0.0, most)


def delay(interval: float, failures: int) -> float:
    """Return how long to wait after *failures* cycles in a row that failed."""
    interval = max(interval, SHORTEST_SECONDS)
    return min(interval * 2.0 ** min(failures, 30), max(interval, BACKOFF_SECONDS))


class Agent:
    """One agent; *load* reads the settings, and is called again on SIGHUP."""

    def __init__(
        self,
        load: Callable[[], Settings],
        report: Reporter,
        wakeup: Wakeup,
        options: AgentOptions,
        *,
        work: Work | None = None,
        clock: Clock = wall_clock,
        timer: Callable[[], float] = time.monotonic,
        jitter: Callable[[float], float] | None = None,
    ) -> None:
        self._load = load
        self._settings = load()
        self._report = report
        self._wakeup = wakeup
        self._options = options
        self._work = work or Engine()
        self._clock = clock
        self._timer = timer
        self._jitter = jitter or jitter_of_host()
        self._watchdog = systemd.Watchdog(SILENCE_SECONDS, timer)
        self._figures = Figures()
        self.health = self._resumed()

    # -- the loop ----------------------------------------------------------------------------------

    def run(self) -> None:
        """
        Go on until the bell says stop.

        Raises:
            SystemExit: a signal came while a cycle or a wait went on; everything was let go.
            UsageError: the metrics' port is taken.
        """
        with self._served(), self._watchdog.given(), self._announced():
            self._measure()
            while not self._wakeup.stops():
                ended = self._cycle()
                seconds = delay(self._interval, self.health.failures) + self._jitter(min(self._interval, self._most_jitter))
                self._tell(ended, seconds)
                self._wait(seconds)
                self._reload()

    def once(self) -> Ended:
        """Run one cycle, tell of it, and return how it ended."""
        try:
            ended = self._cycle()
        except SystemExit:
            self._write_health("stopped")
            raise
        self._tell(ended, None)
        return ended

    @contextlib.contextmanager
    def _announced(self) -> Iterator[None]:
        systemd.notify("READY=1", "STATUS=at work")
        try:
            yield
        finally:
            systemd.notify("STOPPING=1")
            self._write_health("stopped")

    @contextlib.contextmanager
    def _served(self) -> Iterator[None]:
        if self._options.metrics_port is None:
            yield
            return
        try:
            port, end = metrics.serve(self._options.metrics_port, lambda: self._figures, self._clock)
        except OSError as error:
            raise UsageError(f"metrics cannot be served on port {self._options.metrics_port}: {error.strerror}") from None
        self._report(Notice(level="info", text=f"metrics: http://127.0.0.1:{port}/metrics"))
        try:
            yield
        finally:
            end()

    @property
    def _interval(self) -> float:
        asked = self._options.interval_seconds
        return units.seconds(self._settings.agent.interval) if asked is None else asked

    @property
    def _most_jitter(self) -> float:
        return units.seconds(self._settings.agent.jitter)

    def _wait(self, seconds: float) -> None:
        self._watchdog.beat(seconds)
        until = self._timer() + seconds
        while not (self._wakeup.stops() or self._wakeup.reloads()) and (left := until - self._timer()) > 0:
            self._wakeup.wait(left)
        self._watchdog.beat()

    def _reload(self) -> None:
        if not self._wakeup.reloads():
            return
        self._wakeup.reloaded()
        systemd.reloading()
        try:
            self._settings = self._load()
            self._report(Notice(level="info", text="settings read again"))
        except ReconcileError as error:
            self._report(Notice(level="warning", text=f"the settings stay as they were: {error.message}"))
        systemd.notify("READY=1")

    # -- a cycle -----------------------------------------------------------------------------------

    def _cycle(self) -> Ended:
        self._write_health("working")
        begun = self._timer()
        outcome, message, error = self._worked()
        ended = Ended(outcome=outcome, message=message, at=self._clock(), seconds=self._timer() - begun, error=error)
        self.health = self._after(ended)
        return ended

    def _worked(self) -> tuple[Word, str, Exception | None]:
        try:
            return *self._synced_and_scrubbed(), None
        except StoreBusy as error:
            return "busy", error.message, error
        except TrustError as error:
            return "refused", f"{error.name}: {error.message}", error
        except ReconcileError as error:
            return "error", f"{error.name}: {error.message}", error
        except Exception as error:  # noqa: BLE001  a fault of ours must not end the service that mends nodes
            return "error", f"unexpected {type(error).__name__}: {error}", error

    def _synced_and_scrubbed(self) -> tuple[Word, str]:
        longest = max(self._interval, BACKOFF_SECONDS) + self._most_jitter
        failed = self._work.sync(self._settings, self._hear, self._options.run)
        damaged = self._work.scrub(self._settings, self._hear, self._options.run, longest)
        words = [f"{units.count(failed, 'model')} failed"] * bool(failed) + [f"{damaged} damaged, repair tried"] * bool(damaged)
        return "models-failed" if failed else "done", ", ".join(words)

    def _hear(self, event: Event) -> None:
        self._watchdog.beat()
        self._report(event)

    # -- telling -----------------------------------------------------------------------------------

    def _after(self, ended: Ended) -> Health:
        failed, before = ended.outcome in _FAILURES, self.health
        good = ended.outcome in {"done", "models-failed"}
        return msgspec.structs.replace(
            before,
            phase="waiting",
            outcome=ended.outcome,
            message=ended.message,
            ended_at=ended.at,
            seconds=round(ended.seconds, 3),
            succeeded_at=ended.at if good else before.succeeded_at,
            failures=before.failures + 1 if failed else 0 if good else before.failures,
            totals=before.totals | {ended.outcome: before.totals.get(ended.outcome, 0) + 1},
        )

    def _tell(self, ended: Ended, seconds: float | None) -> None:
        next_at = ended.at + timedelta(seconds=seconds) if seconds is not None else None
        self.health = msgspec.structs.replace(self.health, next_at=next_at)
        if ended.outcome in _FAILURES and seconds is not None:
            hint = getattr(ended.error, "hint", "")
            again = f"; tried again in {units.human_time(seconds)}{' (' if hint else ''}{hint}{')' if hint else ''}"
            self._report(Notice(level="warning", text=ended.message + again))
        self._write_health("stopped" if seconds is None else "waiting")
        self._measure()
        systemd.notify(f"STATUS={ended.outcome}{': ' if ended.message else ''}{' '.join(ended.message.split())[:200]}")

    def _write_health(self, phase: Phase) -> None:
        next_at = self.health.next_at if phase == "waiting" else None
        self.health = msgspec.structs.replace(self.health, phase=phase, next_at=next_at)
        with self._warned("the health file"):
            health_file.write(self._settings, self.health)

    def _measure(self) -> None:
        if self._options.metrics_port is None and self._options.metrics_file is None:
            return
        with self._warned("the metrics"):
            self._figures = msgspec.structs.replace(self._work.measure(self._settings), run=self._run_figures())
            if self._options.metrics_file is not None:
                atomic.write(self._options.metrics_file, metrics.render(self._figures, self._clock()))

    def _run_figures(self) -> RunFigures | None:
        now = self.health
        if now.ended_at is None:
            return None
        return RunFigures(
            at=now.ended_at,
            seconds=now.seconds,
            failures=now.failures,
            totals=now.totals,
            succeeded_at=now.succeeded_at,
            next_at=now.next_at,
        )

    @contextlib.contextmanager
    def _warned(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ReconcileError, OSError) as error:
            self._report(Notice(level="warning", text=f"{what} could not be written: {error}"))

    def _resumed(self) -> Health:
        """Return the health to begin with: counts and the last success go on where the last agent stopped."""
        started = self._clock()
        before = health_file.read(self._settings)
        if before is None:
            return Health(phase="working", started_at=started)
        return Health(phase="working", started_at=started, succeeded_at=before.succeeded_at, totals=before.totals)
