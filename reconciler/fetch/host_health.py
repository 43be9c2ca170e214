"""
Which hosts are left alone for a while: those that answer nobody, in this run and over several.

Rules that hold here:

1. It is a matter of the host that nothing connects, that it does not answer in time, or that it says that it is overloaded. Any other
   answer, also that it does not have a file, shows that it is there.
2. Where it gave nothing for ``CIRCUIT_BLOBS`` blobs of a run, and answered none, the other blobs do not wait for it too: one request in
   ``PROBE_SECONDS`` finds out whether it is back.
3. Where it gave nothing in two runs, one after the other, it is asked again after a time that is drawn at random from a span that doubles
   with each further run, up to ``LONGEST_SECONDS`` (full jitter: nodes that failed together do not come back together). A host that names
   a time itself (Retry-After) is obeyed from the first run on, up to the same bound. A run that a person asked for waits for neither.
4. What is remembered is bounded, and of no consequence for what is believed: to lose it costs a request.
5. No clock, no file and no socket: time is an argument.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from msgspec import Struct

from reconciler.fetch.connection import endpoint_of
from reconciler.fetch.resolver import ProbeRequest, ProbeResult, Resolver
from reconciler.fetch.sources import Failure

CIRCUIT_BLOBS = 4
PROBE_SECONDS = 30.0
#: The span for the second run that failed.
FIRST_SECONDS = 30.0
LONGEST_SECONDS = 3600.0
#: Hosts that are remembered.
MOST_HOSTS = 256

LEFT_ALONE = Failure(text="its host did not answer in earlier runs, or asked to be left alone; it is asked again later", final=True)
OPEN = Failure(text="its host did not answer for several other files of this run", final=True)


class HostRecord(Struct, frozen=True, kw_only=True):
    """A host that gave nothing in so many runs, one after the other, and when it may be asked again."""

    failures: int
    retry_at: datetime


class _Host:
    def __init__(self) -> None:
        self.silent_for: set[str] = set()
        self.answered = False
        self.asked_seconds = 0.0
        self.probe_at = 0.0


class HostHealth:
    """The hosts of one run. *known*: what earlier runs remembered; *patient*: whether that is obeyed; *draw* gives from 0 to below 1."""

    def __init__(self, known: Mapping[str, HostRecord], now: datetime, *, patient: bool, draw: Callable[[], float] = random.random) -> None:
        self._known, self._now, self._patient, self._draw = known, now, patient, draw
        self._hosts: dict[str, _Host] = {}

    def refusal(self, url: str, monotonic: float) -> Failure | None:
        """Return why the host of *url* is not asked now, or None if it is; *monotonic* is a reading of the monotonic clock, in seconds."""
        name = _host_of(url)
        host, record = self._hosts.get(name), self._known.get(name)
        if host is not None and len(host.silent_for) >= CIRCUIT_BLOBS:
            if monotonic < host.probe_at:
                return OPEN
            host.probe_at = monotonic + PROBE_SECONDS
        if self._patient and record is not None and not (host and host.answered):
            left = (record.retry_at - self._now).total_seconds()
            if 0 < left <= LONGEST_SECONDS:  # a time that lies further ahead is of a clock that was wrong
                return LEFT_ALONE
        return None

    def record(self, url: str, blob: str, result: ProbeResult, monotonic: float) -> None:
        """Record what came of asking *url* for *blob*."""
        host = self._hosts.setdefault(_host_of(url), _Host())
        if not isinstance(result, Failure) or result.permanent:
            host.answered = True
            host.silent_for.clear()
            return
        host.asked_seconds = max(host.asked_seconds, result.retry_after)
        if len(host.silent_for) < CIRCUIT_BLOBS:
            host.silent_for.add(blob)
            host.probe_at = monotonic + PROBE_SECONDS

    def after(self) -> dict[str, HostRecord]:
        """Return what the next run is to know."""
        found = dict(self._known)
        for name, host in self._hosts.items():
            if host.silent_for and not host.answered:
                found[name] = self._failed(found.pop(name, None), host)
            else:
                found.pop(name, None)
        return dict(list(found.items())[-MOST_HOSTS:])

    def _failed(self, before: HostRecord | None, host: _Host) -> HostRecord:
        failures = (before.failures if before else 0) + 1
        span = min(FIRST_SECONDS * 2.0 ** min(failures - 2, 20), LONGEST_SECONDS) if failures > 1 else 0.0
        wait = max(self._draw() * span, min(host.asked_seconds, LONGEST_SECONDS))
        return HostRecord(failures=failures, retry_at=self._now + timedelta(seconds=wait))


def _host_of(url: str) -> str:
    return str(endpoint_of(url) or "")


class GuardedResolver(Resolver):
    """A resolver that leaves hosts alone: for them, the failure comes at once and without a request."""

    health: HostHealth
    timer: Callable[[], float]

    def guard(self, health: HostHealth, timer: Callable[[], float]) -> None:
        """Ask *health* before each request, and tell it of each result; *timer* reads the monotonic clock."""
        self.health, self.timer = health, timer

    def submit(self, request: ProbeRequest) -> None:
        """Queue *request*, or its failure."""
        if (refusal := self.health.refusal(request.url, self.timer())) is not None:
            self.refuse(request, refusal)
        else:
            super().submit(request)

    def results(self) -> list[tuple[ProbeRequest, ProbeResult]]:
        """Return the results since the last call."""
        found = super().results()
        for request, result in found:
            if result is not LEFT_ALONE and result is not OPEN:
                self.health.record(request.url, request.digest, result, self.timer())
        return found
