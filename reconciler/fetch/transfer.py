"""
One blob's transfer from its sources into staging.

Rules that hold here:

1. Bytes are hashed as their unbroken beginning grows, and the last of them after the transfer has ended. A new transfer is a new hash
   from byte 0: what was continued is hashed like all else, and nothing may be written behind the hashing's back.
2. The signed size is the cap. A transfer that announces another one, or passes it, is stopped at the next look.
3. After a mismatch nothing of the attempt is kept.
4. A full disk fails this blob, with nothing left of it; the others go on. A small one, which another may have left without room, is
   tried once more.
"""

from __future__ import annotations

import secrets
from collections import deque

from msgspec import Struct

from reconciler.core import digest as digests
from reconciler.core.errors import DiskFull, ReconcileError, StoreError
from reconciler.fetch import aria2_daemon, aria2_protocol, hashing, sources, staging
from reconciler.fetch.aria2_protocol import Ending, Status
from reconciler.fetch.resolver import InlineBody, ProbeRequest, ProbeResult, Resolved, Resolver
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.source_selection import Blame, GiveUp, RetryLater, SourceSelector, TrySources
from reconciler.fetch.sources import Failure, Rules
from reconciler.fetch.staging import Attempt, Staging
from reconciler.ports import Fetched, FetchFailed, Incident, Reporter, Want

#: Mirrors that answer later than this after the first join the transfer while it runs.
LATE_MIRROR_SECONDS = 0.3
#: Smaller files come over one connection, so from one source.
TOGETHER_BYTES = 2 << 20
#: What a killed run loses of a connection lies in buffers, so smaller files get fewer of them, down to these: ten kills of 24 MiB over 8
#: connections sent 1.21 to 1.27 times its size, and 1.12 to 1.15 times over 4.
_BYTES_A_CONNECTION = 6 << 20
_FEWEST_CONNECTIONS = 4
#: A blob up to this size is hardly what filled the disk.
RETRY_DISK_FULL_BYTES = 64 << 20


class TransferContext(Struct, frozen=True):
    """What all transfers share."""

    settings: FetchSettings
    rules: Rules
    staging: Staging
    resolver: Resolver
    hashers: hashing.Hashers
    report: Reporter


class Transfer:
    """
    A blob on its way. ``phase`` is one of: new, choosing, asking, ready, moving, stopping, hashing, done.

    The loop (``fetcher``) calls ``step`` in every round, launches what is ready, and brings replies and statuses.
    """

    def __init__(self, token: int, want: Want, context: TransferContext) -> None:
        self.token, self.want, self.context = token, want, context
        settings = context.settings
        self.direct = want.size <= settings.direct_bytes and not settings.limit_bytes
        together = not self.direct and want.size >= TOGETHER_BYTES
        self.selector = SourceSelector(want.digest, sources.order(want, settings.fallback), settings, together=together)
        self.phase = "new"
        self.outcome: Fetched | FetchFailed | None = None
        self.gid = ""
        self.downloaded = self.speed = 0
        self._attempt: Attempt | None = None
        self._job: hashing.Job | None = None
        self._resolved: dict[str, Resolved] = {}
        self._unanswered: set[str] = set()
        self._used: tuple[str, ...] = ()
        #: Whose bytes are in the file, beside those that an earlier run left.
        self._contributors: dict[str, None] = {}
        self._has_leftover = False
        self._furthest = 0
        self._wake_at = 0.0
        self._slow_since = (0.0, 0)
        self._stop_reason: str = ""
        self._unreadable = 0
        self._disk_full_retried = False
        self.late_mirrors: deque[str] = deque()

    # -- what the loop asks ----------------------------------------------------------------------------

    @property
    def hashed(self) -> int:
        """Bytes that were hashed so far."""
        return self._job.hashed if self._job else 0

    @property
    def source(self) -> str:
        """Where the bytes come from, for people."""
        return sources.redact(self._used[0]) if self._used else ""

    @property
    def attempt(self) -> Attempt:
        """The files in staging."""
        assert self._attempt
        return self._attempt

    @property
    def wake_at(self) -> float:
        """When ``step`` is worth calling again, where that is known."""
        return self._wake_at

    def step(self, now: float) -> None:
        """Go on as far as that is possible now."""
        try:
            if self.phase == "new":
                self._start()
            if self.phase == "selecting" and now >= self._wake_at:
                self._select_sources(now)
            if self.phase == "probing":
                self._await_probes(now)
            if self.phase == "hashing" and self._job and self._job.result:
                self._on_hashed(self._job.result, now)
        except ReconcileError as error:
            self.fail(error)

    def _start(self) -> None:
        self.phase = "selecting"
        if self.direct:
            return
        self._resume()
        self._has_leftover = self.attempt.resumed > 0
        if self.attempt.resumed == self.want.size:
            self._start_hashing(self.want.size)
            self.phase = "hashing"

    def _select_sources(self, now: float) -> None:
        match self.selector.next(now):
            case GiveUp(error=error):
                self.fail(error)
            case RetryLater(until=until):
                self._wake_at = until
            case TrySources(urls=urls):
                self._resolved.clear()
                self._unanswered = set()
                self._wake_at = 0.0
                self.phase = "probing"
                for url in urls[:1] if self.direct else urls:
                    self._probe(url)

    def _probe(self, url: str) -> None:
        into = None
        if self.direct:
            self._start_over()
            into = self.attempt.data
        self._unanswered.add(url)
        request = ProbeRequest(
            token=self.token, url=url, digest=self.want.digest, size=self.want.size, rules=self.context.rules, into=into,
        )  # fmt: skip
        self.context.resolver.submit(request)

    def on_probe_result(self, request: ProbeRequest, result: ProbeResult, now: float) -> None:
        """Take a source's answer."""
        if request.url not in self._unanswered or self.phase == "done":
            return
        self._unanswered.discard(request.url)
        match result:
            case Failure():
                self._report_blames(self.selector.record_failure((request.url,), result, now))
            case Resolved():
                self._resolved[request.url] = result
                if not self._wake_at:
                    self._wake_at = now + LATE_MIRROR_SECONDS
                if self.phase in {"ready", "downloading"}:
                    self._add_late_source(request.url, result)
            case InlineBody(hashed=hashed):
                self._used = (request.url,)
                self._contributors = {request.url: None}
                self.downloaded = self.want.size
                self._on_hashed(hashed, now)
        self.step(now)

    def _await_probes(self, now: float) -> None:
        """Begin when all sources have answered, or soon after the first good one: a dead mirror must not hold up the others."""
        if self._unanswered and (not self._resolved or now < self._wake_at):
            return
        if self._resolved:
            self._use_found_sources()
        else:
            self.phase = "selecting"
            self._wake_at = now

    def _use_found_sources(self) -> None:
        first = next(iter(self._resolved))
        with_ranges = tuple(url for url, found in self._resolved.items() if found.ranges)
        # A source without ranges gives the whole file over one connection, or nothing: it is used where there is no other.
        self._used = with_ranges if self.selector.together and with_ranges else with_ranges[:1] or (first,)
        self.phase = "ready"

    def _add_late_source(self, url: str, found: Resolved) -> None:
        if self.selector.together and found.ranges and self._resolved[self._used[0]].ranges:
            self._used = (*self._used, url)
            self._contributors[url] = None
            self.late_mirrors.append(found.url)

    # -- the transfer ----------------------------------------------------------------------------------

    def start_download(self, now: float) -> aria2_daemon.Download:
        """Return the transfer that is to be begun."""
        self.late_mirrors.clear()
        ranges = self._resolved[self._used[0]].ranges
        most = max(_FEWEST_CONNECTIONS, self.want.size // _BYTES_A_CONNECTION)
        if not ranges and self.attempt.resumed:
            self._start_over()  # it could only be refused, with an error 8
        self._contributors.update(dict.fromkeys(self._used))
        self.gid = secrets.token_hex(8)
        self.phase = "downloading"
        self._slow_since = (now, self.attempt.resumed)
        self.downloaded = self.attempt.resumed
        return aria2_daemon.Download(
            gid=self.gid, urls=tuple(self._resolved[url].url for url in self._used), folder=self.attempt.folder, size=self.want.size,
            connections=min(self.context.settings.connections, most) if ranges else 1,
        )  # fmt: skip

    def on_status(self, status: Status, now: float) -> bool:
        """Take what the downloader says; return whether the transfer is to be stopped."""
        self.downloaded, self.speed = status.done, status.speed
        if self.phase == "stopping":
            if status.state in {"removed", "error", "complete"}:
                self._on_stopped(now)
            return False
        if status.total not in {0, self.want.size} or status.done > self.want.size:
            return self._request_stop("size")
        match status.state:
            case "active":
                self._hash_prefix(status.prefix)
                self.context.staging.record_pieces(self.attempt, status.bitfield)
                return self._is_slow(status.done, now) and self._request_stop("slow")
            case "complete":
                self._on_completed(now)
            case "error" | "removed":
                self._on_download_failed(aria2_protocol.ending(status.error, status.text), now)
            case _:
                self._slow_since = (now, status.done)
        return False

    def on_refused(self, text: str, now: float) -> None:
        """Take the downloader's refusal to begin."""
        self._on_download_failed(Ending(failure=Failure(text=f"the downloader refuses it: {text}", permanent=False)), now)

    def on_daemon_lost(self, now: float) -> None:
        """Continue with the next downloader, now that this one is gone, from what is on the disk."""
        self._cancel_hashing()
        self.gid = ""
        try:
            if staging.length(self.attempt.data) > self.want.size:
                self._reject_bytes(self._wrong_length(), now)
                return
            self._resume()
            self.phase = "ready"
        except ReconcileError as error:
            self.fail(error)

    def _hash_prefix(self, prefix: int) -> None:
        """Let the hashing follow, but for the last byte: whether the file is whole is known at the transfer's end."""
        upto = min(prefix, self.want.size - 1)
        if upto <= 0:
            return
        if self._job and upto < self._job.hashed:
            self._cancel_hashing()  # the downloader went back, which it never should: hash again from byte 0
        if self._job:
            self._job.extend_to(upto)
        else:
            self._start_hashing(upto)

    def _is_slow(self, done: int, now: float) -> bool:
        since, before = self._slow_since
        settings = self.context.settings
        if now - since < settings.slow_seconds:
            return False
        self._slow_since = (now, done)
        return done - before < aria2_protocol.least_rate(settings) * (now - since)

    def _request_stop(self, why: str) -> bool:
        self._stop_reason = why
        self.phase = "stopping"
        return True

    def _on_stopped(self, now: float) -> None:
        self.gid = ""
        if self._stop_reason == "size":
            self._reject_bytes(self._wrong_length(), now)
        else:
            self._cancel_hashing()
            self._report_blames(self.selector.record_slow(self._used, now))
            self._retry(now, discard=False)

    def _wrong_length(self) -> Failure:
        return Failure(text=f"it sends another length than the signed {self.want.size} bytes", kind="size-mismatch")

    def _on_completed(self, now: float) -> None:
        self.gid = ""
        length = staging.length(self.attempt.data)
        if length != self.want.size:
            failure = Failure(text=f"it sent {max(length, 0)} of the signed {self.want.size} bytes", kind="size-mismatch")
            self._reject_bytes(failure, now)
            return
        if self._job:
            self._job.extend_to(self.want.size)
        else:
            self._start_hashing(self.want.size)
        self.phase = "hashing"

    def _on_download_failed(self, ending: Ending, now: float) -> None:
        self.gid = ""
        self._cancel_hashing()
        if ending.node:
            self._on_disk_error(ending.failure.text, now, full=ending.failure.kind == "disk-full")
            return
        self._report_blames(self.selector.record_interrupted(self._used, ending.failure, now, gained=self._made_progress()))
        self._retry(now, discard=ending.discard)

    def _made_progress(self) -> bool:
        """Whether this attempt came clearly further than any before it."""
        if self.downloaded <= self._furthest + max(self.want.size // 64, 1):
            return False
        self._furthest = self.downloaded
        return True

    def _retry(self, now: float, *, discard: bool) -> None:
        if discard:
            self._start_over()
        else:
            self._resume()
        self.phase, self._wake_at = "selecting", now

    def _resume(self) -> None:
        """Go on from what is on the disk, if anything there can be gone on from."""
        found = self.context.staging.resume(self.want.digest, self.want.size)
        if found:
            self._attempt = found
            self.downloaded = found.resumed
        else:
            self._start_over()

    def _start_over(self) -> None:
        self._attempt = self.context.staging.start_attempt(self.want.digest)
        self._contributors.clear()
        self._has_leftover = False
        self.downloaded = 0

    # -- the verdict -----------------------------------------------------------------------------------

    def _start_hashing(self, upto: int) -> None:
        algorithm = digests.parse(self.want.digest)[0]
        self._job = self.context.hashers.start(self.attempt.data, algorithm, self.want.size, upto=upto)

    def _cancel_hashing(self) -> None:
        if self._job:
            self._job.cancel()
            self._job = None

    def _on_hashed(self, hashed: hashing.Hashed, now: float) -> None:
        self._job = None
        if hashed.error:
            self._on_unreadable(hashed.error, now)
        elif hashed.found != self.want.digest:
            self._reject_bytes(Failure(text=f"its bytes hash to {hashed.found}", kind="hash-mismatch"), now)
        else:
            self._report_blames(self.selector.record_verified(tuple(self._contributors)))
            self._finish(Fetched(
                digest=self.want.digest, size=hashed.size, path=self.attempt.data, device=hashed.device, inode=hashed.inode,
                mtime_ns=hashed.mtime_ns, sources=tuple(sources.redact(url) for url in self._contributors),
            ))  # fmt: skip

    def _reject_bytes(self, failure: Failure, now: float) -> None:
        self._cancel_hashing()
        self._report_blames(self.selector.record_wrong_bytes(tuple(self._contributors), failure, resumed=self._has_leftover))
        self._retry(now, discard=True)

    def _on_unreadable(self, error: str, now: float) -> None:
        """Try again, and not for ever: the bytes are here and cannot be read, which is nobody's fault but this machine's."""
        self._unreadable += 1
        if "ENOSPC" in error or "[Errno 28]" in error or "[Errno 122]" in error:
            self._on_disk_error(error, now, full=True)
        elif self._unreadable >= self.context.settings.attempts:
            self.fail(StoreError(f"cannot verify {self.want.digest}: {error}", hint="check this machine's disk (`dmesg`)"))
        else:
            self._report_blames([Blame("", Failure(text=f"the file in staging could not be verified: {error}", kind="hash-mismatch"))])
            self._retry(now, discard=True)

    def _on_disk_error(self, text: str, now: float, *, full: bool) -> None:
        if full and not self._disk_full_retried and self.want.size <= RETRY_DISK_FULL_BYTES:
            self._disk_full_retried = True
            self._retry(now, discard=True)
            self._wake_at = now + 2 * self.context.settings.backoff_seconds
            return
        self.fail((DiskFull if full else StoreError)(f"cannot keep {self.want.digest}: {text}"))

    def _report_blames(self, blames: list[Blame]) -> None:
        for blame in blames:
            shown = sources.redact(blame.url) if blame.url else ""
            self.context.report(Incident(kind=blame.failure.kind, blob=self.want.digest, source=shown, detail=blame.failure.text))

    def abandon(self) -> None:
        """Leave it where it is: nobody waits for the outcome any more."""
        self._cancel_hashing()
        self.gid = ""

    def fail(self, error: ReconcileError) -> None:
        """End without the blob. What the disk could not take is deleted, so that others have room."""
        self._cancel_hashing()
        if isinstance(error, StoreError):
            if isinstance(error, DiskFull):
                self.context.report(Incident(kind="disk-full", blob=self.want.digest, detail=error.message))
            try:
                self.context.staging.discard(self.want.digest)
            except StoreError as second:
                error = second if not isinstance(error, DiskFull) else error
        self._finish(FetchFailed(digest=self.want.digest, error=error))

    def _finish(self, outcome: Fetched | FetchFailed) -> None:
        self.outcome, self.phase, self.gid = outcome, "done", ""
