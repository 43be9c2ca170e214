"""
One blob's transfer from its sources into staging.

Rules that hold here:

1. Bytes are hashed as their unbroken beginning grows, and the last of them after the transfer has ended. A new transfer is a new hash
   from byte 0: what was continued is hashed like all else, and nothing may be written behind the hashing's back.
2. The signed size is the cap. A download that announces another size, or passes it, is stopped at the next poll.
3. After a mismatch nothing of the attempt is kept. A source that must be asked plainly (``source_selection``) starts from byte 0 too.
4. A full disk fails this blob, with nothing left of it; the others go on. A small blob, for which a large one may have left no room, is
   tried once more.
"""

from __future__ import annotations

import secrets
from collections import deque

from msgspec import Struct

from reconciler import files
from reconciler.core import digest as digests
from reconciler.core.errors import DiskFull, ReconcileError, StoreError
from reconciler.core.events import FetchProgress, Incident
from reconciler.fetch import aria2_daemon, aria2_protocol, hashing, sources, staging
from reconciler.fetch.aria2_protocol import Ending, Status
from reconciler.fetch.hash_process import Hashed, Job
from reconciler.fetch.progress import Progress
from reconciler.fetch.resolver import InlineBody, ProbeRequest, ProbeResult, Resolved, Resolver
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.source_selection import Blame, GiveUp, RetryLater, SourceSelector, TrySources
from reconciler.fetch.sources import Failure, Rules
from reconciler.fetch.staging import Attempt, Staging
from reconciler.ports import Fetched, FetchFailed, Reporter, Want

#: Mirrors that answer later than this after the first join the transfer while it runs.
LATE_MIRROR_SECONDS = 0.3
#: Smaller files come over one connection, so from one source.
TOGETHER_BYTES = 2 << 20
#: A blob up to this size is unlikely to be what filled the disk.
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
    The transfer of one blob. ``phase`` is one of: new, selecting, probing, ready, downloading, stopping, hashing, done.

    The loop in ``downloader`` calls ``step`` in every round, starts what is ready, and passes on what resolver and downloader answered.
    """

    def __init__(self, token: int, want: Want, context: TransferContext) -> None:
        self.token, self.want, self.context = token, want, context
        settings = context.settings
        self.direct = want.size <= settings.direct_bytes and not settings.limit_bytes
        together = not self.direct and want.size >= TOGETHER_BYTES
        mirrors, others = sources.expanded(want, settings.mirrors), sources.order(want, settings.fallback)
        self.selector = SourceSelector(want.digest, others, settings, together=together, mirrors=mirrors)
        self.phase = "new"
        self.outcome: Fetched | FetchFailed | None = None
        self.gid = self._stop_reason = ""
        self.progress = Progress(want.size)
        self._attempt: Attempt | None = None
        self._job: Job | None = None
        self._resolved: dict[str, Resolved] = {}
        self._unanswered: set[str] = set()
        self._used: tuple[str, ...] = ()
        #: Whose bytes are in the file, beside those that an earlier run left.
        self._contributors: dict[str, None] = {}
        self._has_leftover = False
        #: When ``step`` is worth calling again, where that is known.
        self.wake_at = 0.0
        self._unreadable, self._disk_full_retried = 0, False
        self.late_mirrors: deque[str] = deque()

    # -- for the loop ----------------------------------------------------------------------------------

    def event(self) -> FetchProgress:
        """Return its progress, for people."""
        done, hashed = min(self.progress.done, self.want.size), self._job.hashed if self._job else 0
        return FetchProgress(
            digest=self.want.digest, done=done, total=self.want.size, rate=self.progress.speed, hashed=hashed,
            resumed=min(self._attempt.resumed, done) if self._attempt else 0, source=sources.redact(self._used[0]) if self._used else "",
        )  # fmt: skip

    @property
    def attempt(self) -> Attempt:
        """The files in staging."""
        assert self._attempt
        return self._attempt

    def step(self, now: float) -> None:
        """Do what can be done now."""
        try:
            if self.phase == "new":
                self._start()
            if self.phase == "selecting" and now >= self.wake_at:
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
                self.wake_at = until
            case TrySources(urls=urls):
                self._resolved.clear()
                self._unanswered = set()
                self.wake_at = 0.0
                self.phase = "probing"
                for url in urls[:1] if self.direct else urls:
                    self._probe(url)

    def _probe(self, url: str) -> None:
        into = None
        if self.direct:
            self._start_over()
            into = self.attempt.data
        self._unanswered.add(url)
        self.context.resolver.submit(ProbeRequest(
            token=self.token, url=url, digest=self.want.digest, size=self.want.size, rules=self.context.rules, into=into,
            plain=self.selector.mode(url) == "plain",
        ))  # fmt: skip

    def on_probe_result(self, request: ProbeRequest, result: ProbeResult, now: float) -> None:
        """Take the result of a probe."""
        if request.url not in self._unanswered or self.phase == "done":
            return
        self._unanswered.discard(request.url)
        match result:
            case Failure():
                may_restart = result.permanent or self.attempt.resumed == 0
                self._report_blames(self.selector.record_failure((request.url,), result, now, may_restart=may_restart))
            case Resolved():
                self._resolved[request.url] = result
                if not self.wake_at:
                    self.wake_at = now + LATE_MIRROR_SECONDS
                if self.phase in {"ready", "downloading"}:
                    self._add_late_source(request.url, result)
            case InlineBody(hashed=hashed):
                self._used = (request.url,)
                self._contributors = {request.url: None}
                self.progress.restart(self.want.size)
                self._on_hashed(hashed, now)
        self.step(now)

    def _await_probes(self, now: float) -> None:
        """Begin when all sources have answered, or soon after the first good one: a dead mirror must not delay the others."""
        if self._unanswered and (not self._resolved or now < self.wake_at):
            return
        if self._resolved:
            self._use_found_sources()
        else:
            self.phase, self.wake_at = "selecting", now

    def _use_found_sources(self) -> None:
        first = next(iter(self._resolved))
        with_ranges = tuple(url for url, found in self._resolved.items() if found.ranges)
        # One without ranges gives the whole file over one connection, or nothing: it is used where there is no other.
        used = with_ranges if self.selector.together and with_ranges else with_ranges[:1] or (first,)
        self._used = tuple(url for url in used if self._resolved[url].may_join(self._resolved[used[0]]))
        self.phase = "ready"

    def _add_late_source(self, url: str, found: Resolved) -> None:
        if self.selector.together and found.ranges and (first := self._resolved[self._used[0]]).ranges and found.may_join(first):
            self._used = (*self._used, url)
            self._contributors[url] = None
            self.late_mirrors.append(found.url)

    # -- the transfer ----------------------------------------------------------------------------------

    def start_download(self, now: float, *, among_others: bool) -> aria2_daemon.Download:
        """Return the download that is to be started."""
        self.late_mirrors.clear()
        ranges = self._resolved[self._used[0]].ranges
        single = not ranges or self.selector.mode(self._used[0]) != "parallel"
        if not ranges and self.attempt.resumed:
            self._start_over()  # continuing could only end in error 8
        self._contributors.update(dict.fromkeys(self._used))
        self.gid = secrets.token_hex(8)
        self.phase = "downloading"
        self.progress.restart(self.attempt.resumed)
        self.progress.start(now)
        return aria2_daemon.Download(
            gid=self.gid, urls=tuple(self._resolved[url].url for url in self._used), folder=self.attempt.folder, size=self.want.size,
            connections=1 if single else aria2_protocol.connections(self.context.settings, self.want.size, among_others=among_others),
            authorization=self._resolved[self._used[0]].authorization,
        )  # fmt: skip

    def on_status(self, status: Status, now: float) -> bool:
        """Take a status from aria2; return whether the download is to be stopped."""
        self.progress.update(status.done, status.speed)
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
                return self.progress.is_slow(now, self.context.settings) and self._request_stop("slow")
            case "complete":
                self._on_completed(now)
            case "error" | "removed":
                self._on_download_failed(aria2_protocol.ending(status.error, status.text), now)
            case _:
                self.progress.watch(now)
        return False

    def on_refused(self, text: str, now: float) -> None:
        """Take aria2's refusal to start the download."""
        self._on_download_failed(Ending(failure=Failure(text=f"aria2 refuses it: {text}", permanent=False)), now)

    def on_daemon_lost(self, now: float) -> None:
        """Continue with the next daemon, now that this one is gone, from what is on the disk."""
        self._cancel_hashing()
        self.gid = ""
        try:
            if staging.length(self.attempt.data) > self.want.size:
                self._reject_bytes(sources.other_length(self.want.size), now)
                return
            self._resume()
            self.phase = "ready"
        except ReconcileError as error:
            self.fail(error)

    def _hash_prefix(self, prefix: int) -> None:
        """Let hashing follow, except for the last byte: whether the file is whole is known when the download ends."""
        upto = min(prefix, self.want.size - 1)
        if upto <= 0:
            return
        if self._job and upto < self._job.hashed:
            self._cancel_hashing()  # aria2 went back, which it never should: hash again from byte 0
        if self._job:
            self._job.extend_to(upto)
        else:
            self._start_hashing(upto)

    def _request_stop(self, why: str) -> bool:
        self._stop_reason = why
        self.phase = "stopping"
        return True

    def _on_stopped(self, now: float) -> None:
        self.gid = ""
        if self._stop_reason == "size":
            self._reject_bytes(sources.other_length(self.want.size), now)
        else:
            self._cancel_hashing()
            self._report_blames(self.selector.record_slow(self._used, now, may_restart=self.progress.is_stuck()))
            self._retry(now, discard=False)

    def _on_completed(self, now: float) -> None:
        self.gid = ""
        length = staging.length(self.attempt.data)
        if length != self.want.size:
            sent = f"it sent {max(length, 0)} of the signed {self.want.size} bytes"
            self._reject_bytes(Failure(text=sent, kind="size-mismatch"), now)
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
        self._report_blames(self.selector.record_interrupted(
            self._used, ending.failure, now, gained=self.progress.is_further(), may_restart=self.progress.is_stuck(),
        ))  # fmt: skip
        self._retry(now, discard=ending.discard)

    def _retry(self, now: float, *, discard: bool) -> None:
        (self._start_over if discard else self._resume)()
        self.phase, self.wake_at = "selecting", now

    def _resume(self) -> None:
        """Continue from what is on the disk, if anything there can be continued."""
        found = self.context.staging.resume(self.want.digest, self.want.size)
        if found:
            self._attempt = found
            self.progress.restart(found.resumed)
        else:
            self._start_over()

    def _start_over(self) -> None:
        self._attempt = self.context.staging.start_attempt(self.want.digest, small=self.direct)
        self._contributors.clear()
        self._has_leftover = False
        self.progress.restart(0)

    # -- verification ----------------------------------------------------------------------------------

    def _start_hashing(self, upto: int) -> None:
        algorithm = digests.parse(self.want.digest)[0]
        self._job = self.context.hashers.start(self.attempt.data, algorithm, self.want.size, upto=upto)

    def _cancel_hashing(self) -> None:
        if self._job:
            self._job.cancel()
            self._job = None

    def _on_hashed(self, hashed: Hashed, now: float) -> None:
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
        """Try again, ``attempts`` times: the bytes are here and cannot be read, which is this machine's fault and no source's."""
        self._unreadable += 1
        if files.refusal_in(error):
            self._on_disk_error(error, now)
        elif self._unreadable >= self.context.settings.attempts:
            self.fail(StoreError(f"cannot verify {self.want.digest}: {error}", hint="check this machine's disk (`dmesg`)"))
        else:
            self._report_blames([Blame("", Failure(text=f"the file in staging could not be verified: {error}", kind="hash-mismatch"))])
            self._retry(now, discard=True)

    def _on_disk_error(self, text: str, now: float, *, full: bool = False) -> None:
        """End with what the file system refuses, of which *text* tells only a part; on a full one, a small blob is tried once more."""
        what = f"keep {self.want.digest}"
        refused = files.refusal_in(text) or files.refusal(self.context.staging.root)
        own = (DiskFull if full else StoreError)(f"cannot {what}: {text}")
        error = files.store_error(what, refused, self.context.staging.root) if refused else own
        if isinstance(error, DiskFull) and not self._disk_full_retried and self.want.size <= RETRY_DISK_FULL_BYTES:
            self._disk_full_retried = True
            self._retry(now, discard=True)
            self.wake_at = now + 2 * self.context.settings.backoff_seconds
            return
        self.fail(error)

    def _report_blames(self, blames: list[Blame]) -> None:
        for blame in blames:
            shown = sources.redact(blame.url) if blame.url else ""
            self.context.report(Incident(kind=blame.failure.kind, blob=self.want.digest, source=shown, detail=blame.failure.text))

    def abandon(self) -> None:
        """Stop, and leave the file as it is: the outcome is not wanted any more."""
        self._cancel_hashing()
        self.gid = ""

    def fail(self, error: ReconcileError) -> None:
        """End without the blob. After a disk error its files are deleted, so that others have room."""
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
