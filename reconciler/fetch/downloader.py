"""
Implements the port ``Fetcher`` with aria2.

One loop in the caller's thread drives all transfers: it takes the results of resolver, aria2 and hashing, lets each transfer act on them,
and sleeps until there are more. Between two steps of the iterator only what was started before runs on; closing the iterator ends that too.

Rules that hold here:

1. One call to aria2 a round, whatever the number of files; four rounds a second, and more only where a file is about to end.
2. When aria2 is lost it is started again, and everything continues from the disk. If it is lost again and again without having downloaded
   anything, the blobs that need it fail.
3. At most ten progress events a second in all, each file in its turn.
4. An empty file is made here and not asked for: its digest is computed like any other's.
5. ``close`` may be called from any thread: it ends the step that runs, and all blobs that are left fail.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec import structs

from reconciler import files
from reconciler.core import digest as digests
from reconciler.core.errors import FetchError, HashMismatch, ReconcileError, SettingsError
from reconciler.core.events import Notice
from reconciler.fetch import aria2_daemon, credentials, hashing, sources
from reconciler.fetch.host_health import GuardedResolver, HostHealth
from reconciler.fetch.progress import POLL_SECONDS, poll_interval
from reconciler.fetch.resolver import Resolver
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.staging import Staging
from reconciler.fetch.transfer import Transfer, TransferContext
from reconciler.ports import Fetched, FetchFailed, Reporter, Want

_PROGRESS_SECONDS = 0.1
#: Small files that are given to aria2 ahead of their turn, so that it need not wait for the next round.
_QUEUED_AHEAD = 32
_QUEUED_AHEAD_BYTES = 64 << 20


class OfflineFetcher:
    """The fetcher of an offline run: every blob fails, with an error that says so."""

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        """Yield a refusal for each of *wants*."""
        del report
        for want in wants:
            yield FetchFailed(
                digest=want.digest, error=FetchError("not fetched, since this run is offline: run it again without --offline")
            )

    def close(self) -> None:
        """Nothing was started."""


class Aria2Fetcher:
    """Fetches blobs into *staging*, a folder on the store's file system that only this object uses."""

    def __init__(self, staging: Path, settings: FetchSettings, hosts: HostHealth | None = None) -> None:
        self._settings = settings
        self._hosts = hosts
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
                run = self._start_run([want for want in wants if want.size], report)
                made = [self._make_empty(want) for want in wants if not want.size]
        except ReconcileError as error:
            yield from (FetchFailed(digest=digest, error=error) for digest in left)
            return
        try:
            for empty in made:
                left.pop(empty.digest, None)
                yield empty
                self._staging.discard(empty.digest)
            outcomes = run.outcomes(self._closed)
            while outcome := self._next(outcomes):
                left.pop(outcome.digest, None)
                yield outcome
        finally:
            with self._step:
                run.stop()
        yield from (FetchFailed(digest=digest, error=_stopped()) for digest in left)

    def _start_run(self, wants: Sequence[Want], report: Reporter) -> _Run:
        if self._closed.is_set():
            raise _stopped()
        self._staging.open()
        try:
            known = credentials.read(self._settings.netrc, self._settings.credentials)
        except SettingsError as error:  # the node's fault and no model's
            raise FetchError(error.message, hint=error.hint) from None
        self._daemon = self._daemon or aria2_daemon.Daemon(self._settings, self._staging.root, self._staging.lock, known)
        self._hashers = self._hashers or hashing.Hashers(max(self._settings.concurrent, os.cpu_count() or 1))
        resolver = self._resolver(known, self._hashers.wake)
        context = TransferContext(self._settings, sources.rules(wants, self._settings), self._staging, resolver, self._hashers, report)
        return _Run(wants, context, self._daemon)

    def _make_empty(self, want: Want) -> Fetched | FetchFailed:
        """Make an empty file for *want*, whose signed size is 0."""
        path = self._staging.start_attempt(want.digest, small=True).data
        with files.translate_errors(f"make {path.name}"):
            fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            digits, seen = hashing.inline(fd, digests.parse(want.digest)[0])
        finally:
            os.close(fd)
        if want.digest.partition(":")[2] != digits:
            return FetchFailed(digest=want.digest, error=HashMismatch(f"its size is 0, and an empty file hashes to {digits}"))
        return Fetched(digest=want.digest, size=0, path=path, device=seen.st_dev, inode=seen.st_ino, mtime_ns=seen.st_mtime_ns)

    def _resolver(self, known: credentials.Credentials, wake: Callable[[], None]) -> Resolver:
        if self._hosts is None:
            return Resolver(self._settings, known, wake)
        guarded = GuardedResolver(self._settings, known, wake)
        guarded.guard(self._hosts, time.monotonic)
        return guarded

    def _next(self, outcomes: Iterator[Fetched | FetchFailed]) -> Fetched | FetchFailed | None:
        with self._step:
            return next(outcomes, None)

    def close(self) -> None:
        """End aria2, the hashing processes and what is being fetched, from any thread and for good; idempotent."""
        self._closed.set()
        daemon, hashers = self._daemon, self._hashers
        if daemon:
            daemon.end()  # an unanswered call to it would delay the step
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


def _stopped() -> FetchError:
    return FetchError("the download was stopped")


class _Run:
    """One call of ``fetch``."""

    def __init__(self, wants: Sequence[Want], context: TransferContext, daemon: aria2_daemon.Daemon) -> None:
        self._context, self._daemon = context, daemon
        transfers = [Transfer(token, want, context) for token, want in enumerate(wants)]
        self._by_token = dict(enumerate(transfers))
        self._small = deque(transfer for transfer in transfers if transfer.direct)
        self._large = deque(transfer for transfer in transfers if not transfer.direct)
        self._active: list[Transfer] = []
        self._polled_at = self._progress_at = 0.0
        self._restarts = 0
        self._most_downloaded = 0
        self._preloading: threading.Thread | None = None
        if self._large:
            context.hashers.prepare()
            with contextlib.suppress(FetchError):  # it is tried again, and told, when a source has answered
                daemon.launch()
            self._preloading = threading.Thread(target=aria2_daemon.preload, name="preload", daemon=True)
            self._preloading.start()

    def outcomes(self, closed: threading.Event) -> Iterator[Fetched | FetchFailed]:
        """Drive all transfers to their ends, or until *closed* is set."""
        while (self._small or self._large or self._active) and not closed.is_set():
            now = time.monotonic()
            self._admit_waiting()
            for request, result in self._context.resolver.results():
                probing = self._by_token[request.token]
                with _failures_of(probing):
                    probing.on_probe_result(request, result, now)
            for transfer in self._active:
                transfer.step(now)
            self._drive_downloads(now)
            for transfer in self._active:
                transfer.step(now)
            self._report_progress(now)
            ended = [transfer for transfer in self._active if transfer.outcome]
            self._active = [transfer for transfer in self._active if not transfer.outcome]
            for transfer in ended:
                assert transfer.outcome
                yield structs.replace(transfer.outcome, more=transfer is not ended[-1])
            if self._active and not ended:
                self._context.hashers.wait(self._pause(time.monotonic()))

    def stop(self) -> None:
        """End what still runs; files that a later run may continue stay."""
        self._context.resolver.close()
        if self._preloading:
            self._preloading.join()
        if any(transfer.gid for transfer in self._active):
            self._daemon.kill()
        for transfer in self._active:
            transfer.abandon()
        for transfer in self._by_token.values():
            if transfer.phase == "done" and not transfer.direct:
                self._context.staging.remove_if_empty(transfer.want.digest)

    def _admit_waiting(self) -> None:
        """Let waiting transfers begin: large ones as the settings permit, small ones as many as can be probed at once."""
        settings = self._context.settings
        for _ in range(min(self._context.resolver.free_slots, len(self._small))):
            self._active.append(self._small.popleft())
        held = [transfer for transfer in self._active if not transfer.direct and transfer.phase != "hashing"] if self._large else []
        places, ahead = len(held), sum(transfer.want.size for transfer in held)
        while self._large:
            size = self._large[0].want.size
            if places >= settings.concurrent and (places >= settings.concurrent + _QUEUED_AHEAD or ahead + size > _QUEUED_AHEAD_BYTES):
                return
            self._active.append(self._large.popleft())
            places, ahead = places + 1, ahead + size

    # -- the downloader --------------------------------------------------------------------------------

    def _drive_downloads(self, now: float) -> None:
        try:
            self._start_downloads(now)
            downloading = [transfer for transfer in self._active if transfer.gid]
            if downloading and now >= self._next_poll(downloading):
                self._poll(downloading)
                self._polled_at = time.monotonic()
        except aria2_daemon.DaemonLost as error:
            self._restart_daemon(str(error))
        except FetchError as error:
            for transfer in self._active:
                if transfer.phase in {"ready", "downloading", "stopping"}:
                    transfer.fail(error)

    def _start_downloads(self, now: float) -> None:
        ready = [transfer for transfer in self._active if transfer.phase == "ready"]
        if not ready:
            return
        if self._preloading:
            self._preloading.join()
        self._daemon.start()
        started, open_ones = [], len(self._large) + sum(not transfer.direct for transfer in self._active)
        for transfer in ready:
            with _failures_of(transfer):
                among_others = open_ones > self._context.settings.concurrent
                started.append((transfer, transfer.start_download(now, among_others=among_others)))
        wrong = self._daemon.add([download for _, download in started])
        for transfer, download in started:
            if download.gid in wrong:
                transfer.on_refused(wrong[download.gid], now)

    def _poll(self, downloading: list[Transfer]) -> None:
        statuses = self._daemon.poll([transfer.gid for transfer in downloading])
        now = time.monotonic()
        stop, over = [], []
        for transfer in downloading:
            gid = transfer.gid
            with _failures_of(transfer):
                if gid not in statuses:
                    transfer.on_refused("it forgot the download", now)
                elif transfer.on_status(statuses[gid], now):
                    stop.append(gid)
            if not transfer.gid:
                over.append(gid)
            while transfer.gid and transfer.late_mirrors:
                self._daemon.add_mirrors(gid, [transfer.late_mirrors.popleft()])
        self._daemon.stop(stop)
        self._daemon.forget([gid for gid in over if gid in statuses])

    def _restart_daemon(self, why: str) -> None:
        downloaded = sum(transfer.progress.done for transfer in self._by_token.values())
        self._restarts = 1 if downloaded > self._most_downloaded + (1 << 20) else self._restarts + 1
        self._most_downloaded = max(downloaded, self._most_downloaded)
        self._context.report(Notice(level="warning", text=f"aria2c was lost ({why}); it is started again"))
        lost = [transfer for transfer in self._active if transfer.phase in {"downloading", "stopping"}]
        for transfer in lost:
            transfer.on_daemon_lost(time.monotonic())
        if self._restarts > self._context.settings.restarts:
            error = FetchError(f"aria2c does not stay up: {why}")
            for transfer in self._active:
                if transfer.phase == "ready":
                    transfer.fail(error)

    # -- time ------------------------------------------------------------------------------------------

    def _pause(self, now: float) -> float:
        downloading = [transfer for transfer in self._active if transfer.gid]
        until = [now + POLL_SECONDS]
        if downloading:
            until.append(self._next_poll(downloading))
        until += [transfer.wake_at for transfer in self._active if transfer.phase in {"selecting", "probing"} and transfer.wake_at]
        return max(0.0, min(until) - now)

    def _next_poll(self, downloading: list[Transfer]) -> float:
        return self._polled_at + poll_interval([transfer.progress for transfer in downloading], self._polled_at)

    def _report_progress(self, now: float) -> None:
        """Report one file's progress, if it is time: the one that was reported longest ago."""
        if now - self._progress_at < _PROGRESS_SECONDS:
            return
        for index, transfer in enumerate(self._active):
            if transfer.phase in {"downloading", "stopping", "hashing"}:
                self._progress_at = now
                self._active.append(self._active.pop(index))
                self._context.report(transfer.event())
                return


@contextlib.contextmanager
def _failures_of(transfer: Transfer) -> Iterator[None]:
    """Let an error fail this one transfer and no other."""
    try:
        yield
    except ReconcileError as error:
        transfer.fail(error)
