"""
The agent's loop: run a cycle, publish its result, wait, repeat.

Rules that hold here:

1. Cycles run one after the other, in the main thread. A cycle that fails has a result, an outcome word and a message; it never ends
   the agent.
2. A store that another run holds is no failure: that run does the work. After a failure the wait doubles, up to an hour.
3. A health file, metrics or notification that cannot be written is a warning, and never fails a cycle.
4. Clock, timer, jitter, wait and the steps of a cycle are parameters, so that two hundred cycles take a test no time.
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

from reconciler.agent import service
from reconciler.agent.cycle import CycleSteps, NodeSteps
from reconciler.commands import status
from reconciler.commands.context import NodeContext, RunOptions, report_bug
from reconciler.commands.status import CycleOutcome, Health, Phase
from reconciler.core import rollout, units
from reconciler.core.errors import NetworkSilent, ReconcileError, StoreBusy, TrustError, UsageError
from reconciler.core.events import Event, Notice
from reconciler.ports import Reporter
from reconciler.report import metrics
from reconciler.report.metrics import NodeMetrics, RunMetrics
from reconciler.store import atomic

#: The longest wait after failures, unless the interval itself is longer.
BACKOFF_SECONDS = 3600.0
#: The first pause after which servers that lag are told again between two cycles.
FOLLOW_SECONDS = 5.0
#: The longest time from the start to the first cycle: a span in which each node has its moment.
START_SECONDS = 300.0
#: No interval is shorter.
SHORTEST_SECONDS = 1.0
#: The longest silence of a working run, as when a large model is copied to cold storage; after it the watchdog is no longer fed.
SILENCE_SECONDS = 3600.0

_FAILURES = ("refused", "silent", "error")


class AgentOptions(Struct, frozen=True, kw_only=True):
    """What the command line says about the agent. None: the settings' interval and address of the metrics, no metrics file."""

    interval_seconds: float | None = None
    metrics_file: Path | None = None
    metrics_address: tuple[str, int] | None = None
    run: RunOptions = RunOptions()


class CycleResult(Struct, frozen=True, kw_only=True):
    """How one cycle ended; *error* is what ``--once`` raises."""

    outcome: CycleOutcome
    message: str = ""
    at: datetime
    seconds: float
    error: Exception | None = None


class Wakeup(Protocol):
    """What interrupts the agent's wait: in production ``service.Wakeup``."""

    def stops(self) -> bool:
        """Whether the agent was asked to end."""
        ...

    def reloads(self) -> bool:
        """Whether the agent was asked to read its settings again."""
        ...

    def reloaded(self) -> None:
        """Forget the request that is handled now."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait, or return at once when something happens."""
        ...


def jitter_of_host() -> Callable[[float], float]:
    """Return a function that draws a jitter of at most so many seconds; its sequence is the host's own, and the same on each start."""
    with contextlib.suppress(OSError):
        return _drawn(Path("/etc/machine-id").read_text().strip() + socket.gethostname())
    return _drawn(socket.gethostname())


def _drawn(seed: str) -> Callable[[float], float]:
    source = random.Random(seed)  # noqa: S311  guessing it gains nothing
    return lambda most: source.uniform(0.0, most)


def delay(interval: float, failures: int) -> float:
    """Return how long to wait after *failures* cycles in a row that failed."""
    interval = max(interval, SHORTEST_SECONDS)
    return min(interval * 2.0 ** min(failures, 30), max(interval, BACKOFF_SECONDS))


class Agent:
    """One agent; *load* reads the settings, and is called again on SIGHUP. The clock is that of what it returns."""

    def __init__(
        self,
        load: Callable[[], NodeContext],
        report: Reporter,
        wakeup: Wakeup,
        options: AgentOptions,
        *,
        steps: CycleSteps | None = None,
        timer: Callable[[], float] = time.monotonic,
        jitter: Callable[[float], float] | None = None,
    ) -> None:
        self._load = load
        self._context = load()
        self._report = report
        self._wakeup = wakeup
        self._options = options
        self._steps = steps or NodeSteps()
        self._timer = timer
        self._jitter = jitter or jitter_of_host()
        self._watchdog = service.Watchdog(SILENCE_SECONDS, timer)
        self._figures = NodeMetrics()
        self.health = self._first_health()

    # -- the loop ----------------------------------------------------------------------------------

    def run(self) -> None:
        """
        Run cycles until a signal ends the agent.

        Raises:
            SystemExit: a signal came during a cycle or a wait; children have ended and the store is released.
            UsageError: the metrics' port is taken.
        """
        with self._metrics_server(), self._watchdog.running(), self._notified():
            self._measure()
            self._wait_for_turn()
            while not self._wakeup.stops():
                result = self._cycle()
                jitter = self._jitter(min(self._interval, self._context.jitter_seconds))
                seconds = delay(self._interval, self.health.failures) + jitter
                self._publish(result, seconds)
                self._wait_and_follow(seconds)
                self._reload()

    def _wait_for_turn(self) -> None:
        """Wait before the first cycle, so that a fleet that is started at once does not ask at once."""
        seconds = rollout.start_delay(self._context.node_id, min(self._interval, START_SECONDS))
        if seconds >= 1.0:
            self._report(Notice(level="info", text=f"the first cycle begins in {units.human_time(seconds)}: nodes take turns"))
            self._wait(seconds)
            self._reload()

    def once(self) -> CycleResult:
        """Run one cycle, publish its result and return it."""
        try:
            result = self._cycle()
        except SystemExit:
            self._write_health("stopped")
            raise
        self._publish(result, None)
        return result

    @contextlib.contextmanager
    def _notified(self) -> Iterator[None]:
        service.notify("READY=1", "STATUS=at work")
        try:
            yield
        finally:
            service.notify("STOPPING=1")
            self._write_health("stopped")

    @contextlib.contextmanager
    def _metrics_server(self) -> Iterator[None]:
        end = self._served() if self._metrics_address else None
        try:
            yield
        finally:
            if end is not None:
                end()

    def _served(self) -> Callable[[], None] | None:
        """Serve the metrics; return what ends that, or None where the address in the settings cannot be had, which ends no agent."""
        assert self._metrics_address is not None
        host, port = self._metrics_address
        try:
            port, end = metrics.serve((host, port), lambda: self._figures, self._context.clock, self._unhealthy)
        except OSError as error:
            text = f"metrics cannot be served at {host}:{port}: {error.strerror}"
            if self._options.metrics_address is not None:
                raise UsageError(text) from None
            self._report(Notice(level="warning", text=f"{text}; set [agent] metrics_address to another address, or to an empty text"))
            return None
        self._report(Notice(level="info", text=f"metrics: http://{f'[{host}]' if ':' in host else host}:{port}/metrics"))
        return end

    @property
    def _metrics_address(self) -> tuple[str, int] | None:
        return self._options.metrics_address or self._context.metrics_address

    def _unhealthy(self) -> str:
        """Return what is wrong with the agent, for those who would restart it; a cycle that failed is no reason to."""
        return "" if self._watchdog.alive else "the agent makes no progress"

    @property
    def _interval(self) -> float:
        asked = self._options.interval_seconds
        return self._context.interval_seconds if asked is None else asked

    def _wait_and_follow(self, seconds: float) -> None:
        """Wait *seconds*; meanwhile tell servers that lag again, after pauses that double: most of them only restart."""
        until, pause, lags = self._timer() + seconds, FOLLOW_SECONDS, bool(self._context.servers)
        while lags and pause < until - self._timer() and not self._is_interrupted:
            self._wait(pause)
            pause *= 2.0
            if not self._is_interrupted:
                lags = self._follow()
        self._wait(until - self._timer())

    def _follow(self) -> bool:
        lags = True
        with self._warned("what servers read"), contextlib.suppress(StoreBusy):
            lags = self._steps.follow(self._context, self._forward)
        self._measure()
        return lags

    @property
    def _is_interrupted(self) -> bool:
        return self._wakeup.stops() or self._wakeup.reloads()

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
        service.reloading()
        try:
            self._context = self._load()
            self._report(Notice(level="info", text="settings read again"))
        except Exception as error:  # noqa: BLE001  as for a cycle
            known = error if isinstance(error, ReconcileError) else self._bug(error)
            self._report(Notice(level="warning", text=f"the settings stay as they were: {known.message}"))
        service.notify("READY=1")

    # -- a cycle -----------------------------------------------------------------------------------

    def _cycle(self) -> CycleResult:
        self._write_health("working")
        begun = self._timer()
        outcome, message, error = self._run_steps()
        seconds = self._timer() - begun
        result = CycleResult(outcome=outcome, message=message, at=self._context.clock(), seconds=seconds, error=error)
        self.health = self._health_after(result)
        return result

    def _run_steps(self) -> tuple[CycleOutcome, str, Exception | None]:
        try:
            return *self._sync_and_scrub(), None
        except StoreBusy as error:
            return "busy", error.message, error
        except TrustError as error:
            return "refused", f"{error.name}: {error.message}", error
        except NetworkSilent as error:
            return "silent", f"{error.name}: {error.message}", error
        except ReconcileError as error:
            return "error", f"{error.name}: {error.message}", error
        except Exception as error:  # noqa: BLE001  a bug must not end the service that mends nodes
            found = self._bug(error)
            return "error", f"{found.name}: {found.message}", found

    def _bug(self, error: Exception) -> ReconcileError:
        return report_bug(error, self._context.layout)

    def _sync_and_scrub(self) -> tuple[CycleOutcome, str]:
        longest = max(self._interval, BACKOFF_SECONDS) + self._context.jitter_seconds
        failed, silence = self._sync()
        damaged = self._steps.scrub(self._context, self._forward, self._options.run, longest)
        if silence is not None:
            raise silence
        words = [f"{units.count(failed, 'model')} failed or not fetched"] if failed else []
        words += [f"{damaged} damaged, repair tried"] if damaged else []
        return "models-failed" if failed else "done", ", ".join(words)

    def _sync(self) -> tuple[int, NetworkSilent | None]:
        """Return how many models failed, and the error of a silent network: all else was done then, and the store is scrubbed as ever."""
        try:
            return self._steps.sync(self._context, self._forward, self._options.run), None
        except NetworkSilent as error:
            return 0, error

    def _forward(self, event: Event) -> None:
        """Report *event* of a run, which is progress too."""
        self._watchdog.beat()
        self._report(event)

    # -- the result of a cycle -----------------------------------------------------------------------

    def _health_after(self, result: CycleResult) -> Health:
        failed, before = result.outcome in _FAILURES, self.health
        good = result.outcome in {"done", "models-failed"}
        return msgspec.structs.replace(
            before,
            phase="waiting",
            outcome=result.outcome,
            message=result.message,
            ended_at=result.at,
            seconds=round(result.seconds, 3),
            succeeded_at=result.at if good else before.succeeded_at and min(before.succeeded_at, result.at),  # a clock may have been ahead
            failures=before.failures + 1 if failed else 0 if good else before.failures,
            totals=before.totals | {result.outcome: before.totals.get(result.outcome, 0) + 1},
        )

    def _publish(self, result: CycleResult, seconds: float | None) -> None:
        """Publish *result*; the next cycle begins in *seconds*, or never."""
        next_at = result.at + timedelta(seconds=seconds) if seconds is not None else None
        self.health = msgspec.structs.replace(self.health, next_at=next_at)
        if result.outcome in _FAILURES and seconds is not None:
            hint = getattr(result.error, "hint", "")
            again = f"; tried again in {units.human_time(seconds)}{' (' if hint else ''}{hint}{')' if hint else ''}"
            self._report(Notice(level="warning", text=result.message + again))
        self._write_health("stopped" if seconds is None else "waiting")
        self._measure()
        self._write_page()
        with self._warned("the status for the network's operator"):
            self._steps.tell(self._context, self._report, self._options.run, wait=seconds is None)
        service.notify(f"STATUS={result.outcome}{': ' if result.message else ''}{' '.join(result.message.split())[:200]}")

    def _write_health(self, phase: Phase) -> None:
        next_at = self.health.next_at if phase == "waiting" else None
        self.health = msgspec.structs.replace(self.health, phase=phase, next_at=next_at)
        with self._warned("the health file"):
            service.write_health(self._context.layout, self.health)

    def _measure(self) -> None:
        if self._metrics_address is None and self._options.metrics_file is None:
            return
        with self._warned("the metrics"):
            self._figures = msgspec.structs.replace(self._steps.measure(self._context), run=self._run_metrics())
            if self._options.metrics_file is not None:
                atomic.write(self._options.metrics_file, metrics.render(self._figures, self._context.clock()))

    def _write_page(self) -> None:
        if self._context.page_path is not None:
            with self._warned("the status page"):
                self._steps.write_page(self._context, self._context.page_path)

    def _run_metrics(self) -> RunMetrics | None:
        now = self.health
        if now.ended_at is None:
            return None
        return RunMetrics(
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
        except Exception as error:  # noqa: BLE001  as for a cycle
            known = error if isinstance(error, ReconcileError | OSError) else self._bug(error)
            self._report(Notice(level="warning", text=f"{what} could not be written: {known}"))

    def _first_health(self) -> Health:
        """Return the health to begin with: counts and the last success go on where the last agent stopped."""
        started = self._context.clock()
        before = status.read_health(self._context.layout)
        if before is None:
            return Health(phase="working", started_at=started)
        return Health(phase="working", started_at=started, succeeded_at=before.succeeded_at, totals=before.totals)
