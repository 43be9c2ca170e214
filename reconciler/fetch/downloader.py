"""
The port ``Fetcher``, over aria2.

One loop in the caller's thread drives all blobs: it takes what resolvers, downloader and hashers have to say, lets each passage go on, and
sleeps until one of them has more. Nothing runs between two steps of the iterator but what was begun already; closing it ends that too.

Rules that hold here:

1. One call a round to the downloader, whatever the number of files; four rounds a second, and more only where a file is about to end.
2. A downloader that is lost is started again, and everything continues from the disk; one that keeps getting lost without having
   brought anything fails its blobs, and theirs alone.
3. At most ten progress events a second in all, each file in its turn.
4. ``close`` is for any thread: the step that runs is ended, and what is left of the run fails. A step is all that may use what it closes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from reconciler.core.errors import FetchError, ReconcileError, SettingsError
from reconciler.fetch import aria2_daemon, credentials, hashing, sources
from reconciler.fetch.resolver import Resolver
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.staging import Staging
from reconciler.fetch.transfer import Passage, Tools
from reconciler.ports import Fetched, FetchFailed, FetchProgress, Notice, Reporter, Want

_POLL_SECONDS = 0.25
_POLL_LEAST = 0.01
_PROGRESS_SECONDS = 0.1
#: Small files that are given to the downloader ahead of their turn, so that it need not wait for the next round.
_AHEAD = 32
_AHEAD_BYTES = 64 << 20


class Aria2Fetcher:
    """Fetches blobs into *staging*, a folder on the store's file system that is this object's alone."""

    def __init__(self, staging: Path, settings: FetchSettings) -> None:
        self._settings = settings
        self._staging = Staging(staging)
        self._daemon: aria2_daemon.Daemon | None = None
        self._hashers: hashing.Hashers | None = None
        self._closed = threading.Event()
        self._step = threading.RLock()

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        """Yield one outcome for each of *wants*, in the order in which they end; a failure for all that ``close`` cut short."""
        if not wants:
            return
        left = {want.digest: None for want in wants}
        try:
            with self._step:
                run = self._begun(wants, report)
        except ReconcileError as error:
            yield from (FetchFailed(digest=digest, error=error) for digest in left)
            return
        try:
            outcomes = run.outcomes(self._closed)
            while outcome := self._next(outcomes):
                left.pop(outcome.digest, None)
                yield outcome
        finally:
            with self._step:
                run.stop()
        yield from (FetchFailed(digest=digest, error=_closed()) for digest in left)

    def _begun(self, wants: Sequence[Want], report: Reporter) -> _Run:
        if self._closed.is_set():
            raise _closed()
        self._staging.open()
        try:
            known = credentials.read(self._settings.netrc)
        except SettingsError as error:  # no model's fault: nobody can be asked for it now
            raise FetchError(error.message, hint=error.hint) from None
        self._daemon = self._daemon or aria2_daemon.Daemon(self._settings, self._staging.root, self._staging.lock, known)
        self._hashers = self._hashers or hashing.Hashers(max(self._settings.concurrent, os.cpu_count() or 1))
        resolver = Resolver(self._settings, known, self._hashers.wake)
        tools = Tools(self._settings, sources.rules(wants, self._settings), self._staging, resolver, self._hashers, report)
        return _Run(wants, tools, self._daemon)

    def _next(self, outcomes: Iterator[Fetched | FetchFailed]) -> Fetched | FetchFailed | None:
        with self._step:
            return next(outcomes, None)

    def close(self) -> None:
        """End the downloader, the hashing processes and what is being fetched, from any thread and for good; idempotent."""
        self._closed.set()
        daemon, hashers = self._daemon, self._hashers
        if daemon:
            daemon.end()  # a call that it leaves unanswered would hold the step up
        if hashers:
            hashers.wake()
        with self._step:
            if self._daemon:
                self._daemon.close()
                self._daemon = None
            if self._hashers:
                self._hashers.close()
                self._hashers = None
            self._staging.close()


def _closed() -> FetchError:
    return FetchError("the download was stopped")


class _Run:
    """One call of ``fetch``."""

    def __init__(self, wants: Sequence[Want], tools: Tools, daemon: aria2_daemon.Daemon) -> None:
        self._tools, self._daemon = tools, daemon
        passages = [Passage(token, want, tools) for token, want in enumerate(wants)]
        self._by_token = dict(enumerate(passages))
        self._small = deque(passage for passage in passages if passage.direct)
        self._large = deque(passage for passage in passages if not passage.direct)
        self._active: list[Passage] = []
        self._polled_at = self._told_at = 0.0
        self._restarts = 0
        self._most_moved = 0
        self._warming: threading.Thread | None = None
        if self._large:
            self._warming = threading.Thread(target=aria2_daemon.warm, name="warm", daemon=True)
            self._warming.start()

    def outcomes(self, closed: threading.Event) -> Iterator[Fetched | FetchFailed]:
        """Drive all passages to their ends, or until *closed* is set."""
        while (self._small or self._large or self._active) and not closed.is_set():
            now = time.monotonic()
            self._admit()
            for question, reply in self._tools.resolver.replies():
                asking = self._by_token[question.token]
                with _failing(asking):
                    asking.answered(question, reply, now)
            for passage in self._active:
                passage.step(now)
            self._transfer(now)
            for passage in self._active:
                passage.step(now)
            self._tell(now)
            ended = [passage for passage in self._active if passage.outcome]
            self._active = [passage for passage in self._active if not passage.outcome]
            for passage in ended:
                assert passage.outcome
                yield passage.outcome
            if self._active and not ended:
                self._tools.hashers.wait(self._pause(time.monotonic()))

    def stop(self) -> None:
        """End what still runs, and leave what a later run may continue."""
        self._tools.resolver.close()
        if any(passage.gid for passage in self._active):
            self._daemon.kill()
        for passage in self._active:
            passage.abandon()
        for passage in self._by_token.values():
            if passage.phase == "done":
                self._tools.staging.tidy(passage.want.digest)

    def _admit(self) -> None:
        """Let waiting blobs begin: large ones as the operator permits, small ones as many as can be asked for at once."""
        settings = self._tools.settings
        for _ in range(min(self._tools.resolver.room, len(self._small))):
            self._active.append(self._small.popleft())
        held = [passage for passage in self._active if not passage.direct and passage.phase != "hashing"] if self._large else []
        places, ahead = len(held), sum(passage.want.size for passage in held)
        while self._large:
            size = self._large[0].want.size
            if places >= settings.concurrent and (places >= settings.concurrent + _AHEAD or ahead + size > _AHEAD_BYTES):
                return
            self._active.append(self._large.popleft())
            places, ahead = places + 1, ahead + size

    # -- the downloader --------------------------------------------------------------------------------

    def _transfer(self, now: float) -> None:
        try:
            self._launch(now)
            moving = [passage for passage in self._active if passage.gid]
            if moving and now >= self._polled_at + self._period(moving):
                self._poll(moving)
                self._polled_at = time.monotonic()
        except aria2_daemon.Lost as error:
            self._restart(str(error))
        except FetchError as error:
            for passage in self._active:
                if passage.phase in {"ready", "moving", "stopping"}:
                    passage.fail(error)

    def _launch(self, now: float) -> None:
        ready = [passage for passage in self._active if passage.phase == "ready"]
        if not ready:
            return
        if self._warming:
            self._warming.join()
        self._daemon.start()
        begun = []
        for passage in ready:
            with _failing(passage):
                begun.append((passage, passage.launch(now)))
        wrong = self._daemon.add([transfer for _, transfer in begun])
        for passage, transfer in begun:
            if transfer.gid in wrong:
                passage.refused(wrong[transfer.gid], now)

    def _poll(self, moving: list[Passage]) -> None:
        statuses = self._daemon.poll([passage.gid for passage in moving])
        now = time.monotonic()
        stop, over = [], []
        for passage in moving:
            gid = passage.gid
            with _failing(passage):
                if gid not in statuses:
                    passage.refused("it forgot the transfer", now)
                elif passage.seen(statuses[gid], now):
                    stop.append(gid)
            if not passage.gid:
                over.append(gid)
            while passage.gid and passage.late:
                self._daemon.widen(gid, [passage.late.popleft()])
        self._daemon.stop(stop)
        self._daemon.forget([gid for gid in over if gid in statuses])

    def _restart(self, why: str) -> None:
        moved = sum(passage.moved for passage in self._by_token.values())
        self._restarts = 1 if moved > self._most_moved + (1 << 20) else self._restarts + 1
        self._most_moved = max(moved, self._most_moved)
        self._tools.report(Notice(level="warning", text=f"the downloader was lost ({why}); it is started again"))
        lost = [passage for passage in self._active if passage.phase in {"moving", "stopping"}]
        for passage in lost:
            passage.interrupted(time.monotonic())
        if self._restarts > self._tools.settings.restarts:
            error = FetchError(f"aria2c does not stay up: {why}")
            for passage in self._active:
                if passage.phase == "ready":
                    passage.fail(error)

    # -- time ------------------------------------------------------------------------------------------

    @staticmethod
    def _period(moving: list[Passage]) -> float:
        """Return how long to wait between two polls: until the next file should end, within limits."""
        left = [(passage.want.size - passage.moved) / passage.speed for passage in moving if passage.speed > 0]
        fresh = 0.02 if any(passage.speed == 0 and passage.want.size < (16 << 20) for passage in moving) else _POLL_SECONDS
        return min(max(min(left, default=_POLL_SECONDS) / 2, _POLL_LEAST), _POLL_SECONDS, fresh)

    def _pause(self, now: float) -> float:
        moving = [passage for passage in self._active if passage.gid]
        until = [now + _POLL_SECONDS]
        if moving:
            until.append(self._polled_at + self._period(moving))
        until += [passage.until for passage in self._active if passage.phase in {"choosing", "asking"} and passage.until]
        return max(0.0, min(until) - now)

    def _tell(self, now: float) -> None:
        """Report one file's progress, if it is time: the one that was reported longest ago."""
        if now - self._told_at < _PROGRESS_SECONDS:
            return
        for index, passage in enumerate(self._active):
            if passage.phase in {"moving", "stopping", "hashing"}:
                self._told_at = now
                self._active.append(self._active.pop(index))
                self._tools.report(FetchProgress(
                    digest=passage.want.digest, done=min(passage.moved, passage.want.size), total=passage.want.size, rate=passage.speed,
                    hashed=passage.hashed, source=passage.source,
                ))  # fmt: skip
                return


@contextlib.contextmanager
def _failing(passage: Passage) -> Iterator[None]:
    """Let what the disk refuses to one blob be that blob's failure."""
    try:
        yield
    except ReconcileError as error:
        passage.fail(error)
