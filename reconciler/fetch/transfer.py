"""
One blob's passage from its sources into staging.

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
from reconciler.fetch import aria2_daemon, aria2_options, aria2_responses, hashing, sources, staging
from reconciler.fetch.aria2_responses import Ending, Status
from reconciler.fetch.resolver import Brought, Question, Reply, Resolved, Resolver
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.source_selection import Ask, Blame, Course, Stop, Wait
from reconciler.fetch.sources import Failure, Rules
from reconciler.fetch.staging import Attempt, Staging
from reconciler.ports import Fetched, FetchFailed, Incident, Reporter, Want

#: Mirrors that answer later than this after the first join the transfer while it runs.
GRACE_SECONDS = 0.3
#: Smaller files come over one connection, so from one source.
TOGETHER_BYTES = 2 << 20
#: What a killed run loses of a connection lies in buffers, so smaller files get fewer of them, down to these: ten kills of 24 MiB over 8
#: connections sent 1.21 to 1.27 times its size, and 1.12 to 1.15 times over 4.
_BYTES_A_CONNECTION = 6 << 20
_FEWEST_CONNECTIONS = 4
#: A blob up to this size is hardly what filled the disk.
CROWDED_BYTES = 64 << 20


class Tools(Struct, frozen=True):
    """What all passages share."""

    settings: FetchSettings
    rules: Rules
    staging: Staging
    resolver: Resolver
    hashers: hashing.Hashers
    report: Reporter


class Passage:
    """
    A blob on its way. ``phase`` is one of: new, choosing, asking, ready, moving, stopping, hashing, done.

    The loop (``fetcher``) calls ``step`` in every round, launches what is ready, and brings replies and statuses.
    """

    def __init__(self, token: int, want: Want, tools: Tools) -> None:
        self.token, self.want, self.tools = token, want, tools
        settings = tools.settings
        self.direct = want.size <= settings.direct_bytes and not settings.limit_bytes
        together = not self.direct and want.size >= TOGETHER_BYTES
        self.course = Course(want.digest, sources.order(want, settings.fallback), settings, together=together)
        self.phase = "new"
        self.outcome: Fetched | FetchFailed | None = None
        self.gid = ""
        self.moved = self.speed = 0
        self._attempt: Attempt | None = None
        self._job: hashing.Job | None = None
        self._resolved: dict[str, Resolved] = {}
        self._asked: set[str] = set()
        self._used: tuple[str, ...] = ()
        #: Whose bytes are in the file, beside those that an earlier run left.
        self._givers: dict[str, None] = {}
        self._inherited = False
        self._best = 0
        self._until = 0.0
        self._slow_since = (0.0, 0)
        self._after_stop: str = ""
        self._unreadable = 0
        self._crowded_out = False
        self.late: deque[str] = deque()

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
    def until(self) -> float:
        """When ``step`` is worth calling again, where that is known."""
        return self._until

    def step(self, now: float) -> None:
        """Go on as far as that is possible now."""
        try:
            if self.phase == "new":
                self._begin()
            if self.phase == "choosing" and now >= self._until:
                self._choose(now)
            if self.phase == "asking":
                self._gather(now)
            if self.phase == "hashing" and self._job and self._job.result:
                self._judge(self._job.result, now)
        except ReconcileError as error:
            self.fail(error)

    def _begin(self) -> None:
        self.phase = "choosing"
        if self.direct:
            return
        self._continue()
        self._inherited = self.attempt.resumed > 0
        if self.attempt.resumed == self.want.size:
            self._hash(self.want.size)
            self.phase = "hashing"

    def _choose(self, now: float) -> None:
        match self.course.next(now):
            case Stop(error=error):
                self.fail(error)
            case Wait(until=until):
                self._until = until
            case Ask(urls=urls):
                self._resolved.clear()
                self._asked = set()
                self._until = 0.0
                self.phase = "asking"
                for url in urls[:1] if self.direct else urls:
                    self._ask(url)

    def _ask(self, url: str) -> None:
        into = None
        if self.direct:
            self._start_over()
            into = self.attempt.data
        self._asked.add(url)
        question = Question(
            token=self.token, url=url, digest=self.want.digest, size=self.want.size, rules=self.tools.rules, into=into,
        )  # fmt: skip
        self.tools.resolver.ask(question)

    def answered(self, question: Question, reply: Reply, now: float) -> None:
        """Take a source's answer."""
        if question.url not in self._asked or self.phase == "done":
            return
        self._asked.discard(question.url)
        match reply:
            case Failure():
                self._blame(self.course.failed((question.url,), reply, now))
            case Resolved():
                self._resolved[question.url] = reply
                if not self._until:
                    self._until = now + GRACE_SECONDS
                if self.phase in {"ready", "moving"}:
                    self._join(question.url, reply)
            case Brought(hashed=hashed):
                self._used = (question.url,)
                self._givers = {question.url: None}
                self.moved = self.want.size
                self._judge(hashed, now)
        self.step(now)

    def _gather(self, now: float) -> None:
        """Begin when all sources have answered, or soon after the first good one: a dead mirror must not hold up the others."""
        if self._asked and (not self._resolved or now < self._until):
            return
        if self._resolved:
            self._pick()
        else:
            self.phase = "choosing"
            self._until = now

    def _pick(self) -> None:
        first = next(iter(self._resolved))
        with_ranges = tuple(url for url, found in self._resolved.items() if found.ranges)
        # A source without ranges gives the whole file over one connection, or nothing: it is used where there is no other.
        self._used = with_ranges if self.course.together and with_ranges else with_ranges[:1] or (first,)
        self.phase = "ready"

    def _join(self, url: str, found: Resolved) -> None:
        if self.course.together and found.ranges and self._resolved[self._used[0]].ranges:
            self._used = (*self._used, url)
            self._givers[url] = None
            self.late.append(found.url)

    # -- the transfer ----------------------------------------------------------------------------------

    def launch(self, now: float) -> aria2_daemon.Transfer:
        """Return the transfer that is to be begun."""
        self.late.clear()
        ranges = self._resolved[self._used[0]].ranges
        most = max(_FEWEST_CONNECTIONS, self.want.size // _BYTES_A_CONNECTION)
        if not ranges and self.attempt.resumed:
            self._start_over()  # it could only be refused, with an error 8
        self._givers.update(dict.fromkeys(self._used))
        self.gid = secrets.token_hex(8)
        self.phase = "moving"
        self._slow_since = (now, self.attempt.resumed)
        self.moved = self.attempt.resumed
        return aria2_daemon.Transfer(
            gid=self.gid, urls=tuple(self._resolved[url].url for url in self._used), folder=self.attempt.folder, size=self.want.size,
            connections=min(self.tools.settings.connections, most) if ranges else 1,
        )  # fmt: skip

    def seen(self, status: Status, now: float) -> bool:
        """Take what the downloader says; return whether the transfer is to be stopped."""
        self.moved, self.speed = status.done, status.speed
        if self.phase == "stopping":
            if status.state in {"removed", "error", "complete"}:
                self._stopped(now)
            return False
        if status.total not in {0, self.want.size} or status.done > self.want.size:
            return self._stop("size")
        match status.state:
            case "active":
                self._follow(status.prefix)
                self.tools.staging.note(self.attempt, status.bitfield)
                return self._is_slow(status.done, now) and self._stop("slow")
            case "complete":
                self._completed(now)
            case "error" | "removed":
                self._ended(aria2_responses.ending(status.error, status.text), now)
            case _:
                self._slow_since = (now, status.done)
        return False

    def refused(self, text: str, now: float) -> None:
        """Take the downloader's refusal to begin."""
        self._ended(Ending(failure=Failure(text=f"the downloader refuses it: {text}", permanent=False)), now)

    def interrupted(self, now: float) -> None:
        """Continue with the next downloader, now that this one is gone, from what is on the disk."""
        self._drop_job()
        self.gid = ""
        try:
            if staging.length(self.attempt.data) > self.want.size:
                self._wrong(self._other_length(), now)
                return
            self._continue()
            self.phase = "ready"
        except ReconcileError as error:
            self.fail(error)

    def _follow(self, prefix: int) -> None:
        """Let the hashing follow, but for the last byte: whether the file is whole is known at the transfer's end."""
        upto = min(prefix, self.want.size - 1)
        if upto <= 0:
            return
        if self._job and upto < self._job.hashed:
            self._drop_job()  # the downloader went back, which it never should: hash again from byte 0
        if self._job:
            self._job.reach(upto)
        else:
            self._hash(upto)

    def _is_slow(self, done: int, now: float) -> bool:
        since, before = self._slow_since
        settings = self.tools.settings
        if now - since < settings.slow_seconds:
            return False
        self._slow_since = (now, done)
        return done - before < aria2_options.least_rate(settings) * (now - since)

    def _stop(self, why: str) -> bool:
        self._after_stop = why
        self.phase = "stopping"
        return True

    def _stopped(self, now: float) -> None:
        self.gid = ""
        if self._after_stop == "size":
            self._wrong(self._other_length(), now)
        else:
            self._drop_job()
            self._blame(self.course.slow(self._used, now))
            self._again(now, discard=False)

    def _other_length(self) -> Failure:
        return Failure(text=f"it sends another length than the signed {self.want.size} bytes", kind="size-mismatch")

    def _completed(self, now: float) -> None:
        self.gid = ""
        length = staging.length(self.attempt.data)
        if length != self.want.size:
            failure = Failure(text=f"it sent {max(length, 0)} of the signed {self.want.size} bytes", kind="size-mismatch")
            self._wrong(failure, now)
            return
        if self._job:
            self._job.reach(self.want.size)
        else:
            self._hash(self.want.size)
        self.phase = "hashing"

    def _ended(self, ending: Ending, now: float) -> None:
        self.gid = ""
        self._drop_job()
        if ending.node:
            self._refused_by_disk(ending.failure.text, now, full=ending.failure.kind == "disk-full")
            return
        self._blame(self.course.broke(self._used, ending.failure, now, gained=self._gained()))
        self._again(now, discard=ending.discard)

    def _gained(self) -> bool:
        """Whether this attempt came clearly further than any before it."""
        if self.moved <= self._best + max(self.want.size // 64, 1):
            return False
        self._best = self.moved
        return True

    def _again(self, now: float, *, discard: bool) -> None:
        if discard:
            self._start_over()
        else:
            self._continue()
        self.phase, self._until = "choosing", now

    def _continue(self) -> None:
        """Go on from what is on the disk, if anything there can be gone on from."""
        found = self.tools.staging.resume(self.want.digest, self.want.size)
        if found:
            self._attempt = found
            self.moved = found.resumed
        else:
            self._start_over()

    def _start_over(self) -> None:
        self._attempt = self.tools.staging.fresh(self.want.digest)
        self._givers.clear()
        self._inherited = False
        self.moved = 0

    # -- the verdict -----------------------------------------------------------------------------------

    def _hash(self, upto: int) -> None:
        algorithm = digests.parse(self.want.digest)[0]
        self._job = self.tools.hashers.start(self.attempt.data, algorithm, self.want.size, upto=upto)

    def _drop_job(self) -> None:
        if self._job:
            self._job.drop()
            self._job = None

    def _judge(self, hashed: hashing.Hashed, now: float) -> None:
        self._job = None
        if hashed.error:
            self._unread(hashed.error, now)
        elif hashed.found != self.want.digest:
            self._wrong(Failure(text=f"its bytes hash to {hashed.found}", kind="hash-mismatch"), now)
        else:
            self._blame(self.course.proved(tuple(self._givers)))
            self._finish(Fetched(
                digest=self.want.digest, size=hashed.size, path=self.attempt.data, device=hashed.device, inode=hashed.inode,
                mtime_ns=hashed.mtime_ns, sources=tuple(sources.redact(url) for url in self._givers),
            ))  # fmt: skip

    def _wrong(self, failure: Failure, now: float) -> None:
        self._drop_job()
        self._blame(self.course.lied(tuple(self._givers), failure, resumed=self._inherited))
        self._again(now, discard=True)

    def _unread(self, error: str, now: float) -> None:
        """Try again, and not for ever: the bytes are here and cannot be read, which is nobody's fault but this machine's."""
        self._unreadable += 1
        if "ENOSPC" in error or "[Errno 28]" in error or "[Errno 122]" in error:
            self._refused_by_disk(error, now, full=True)
        elif self._unreadable >= self.tools.settings.attempts:
            self.fail(StoreError(f"cannot verify {self.want.digest}: {error}", hint="check this machine's disk (`dmesg`)"))
        else:
            self._blame([Blame("", Failure(text=f"the file in staging could not be verified: {error}", kind="hash-mismatch"))])
            self._again(now, discard=True)

    def _refused_by_disk(self, text: str, now: float, *, full: bool) -> None:
        if full and not self._crowded_out and self.want.size <= CROWDED_BYTES:
            self._crowded_out = True
            self._again(now, discard=True)
            self._until = now + 2 * self.tools.settings.backoff_seconds
            return
        self.fail((DiskFull if full else StoreError)(f"cannot keep {self.want.digest}: {text}"))

    def _blame(self, blames: list[Blame]) -> None:
        for blame in blames:
            shown = sources.redact(blame.url) if blame.url else ""
            self.tools.report(Incident(kind=blame.failure.kind, blob=self.want.digest, source=shown, detail=blame.failure.text))

    def abandon(self) -> None:
        """Leave it where it is: nobody waits for the outcome any more."""
        self._drop_job()
        self.gid = ""

    def fail(self, error: ReconcileError) -> None:
        """End without the blob. What the disk could not take is deleted, so that others have room."""
        self._drop_job()
        if isinstance(error, StoreError):
            if isinstance(error, DiskFull):
                self.tools.report(Incident(kind="disk-full", blob=self.want.digest, detail=error.message))
            try:
                self.tools.staging.discard(self.want.digest)
            except StoreError as second:
                error = second if not isinstance(error, DiskFull) else error
        self._finish(FetchFailed(digest=self.want.digest, error=error))

    def _finish(self, outcome: Fetched | FetchFailed) -> None:
        self.outcome, self.phase, self.gid = outcome, "done", ""
