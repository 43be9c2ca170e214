"""
Which source of a blob is asked next, how it is asked, and which source is to blame for what. No clock, no file and no socket.

Rules that hold here:

1. The node's own mirrors come first, one at a time; the others are asked when no mirror can be asked now. All other good sources are used
   together, until bytes that came from several prove wrong, or a shared transfer fails without having gained anything. From then on each
   is used alone, so that a failure has one source to blame. After wrong bytes, from byte 0.
2. A source that gave wrong bytes is not asked again in this run. One that failed is asked ``attempts`` times, with a growing pause between.
   Bytes that were gained start the count anew. They are counted by the furthest byte ever reached, so that this ends.
3. Ranges may fail where the whole file would come: a source that failed with several connections is asked over one, and a source is
   exhausted only when one plain request (no Range header, from byte 0) has failed too. There are two exceptions. A failure that says
   nothing about ranges (``Failure.final``) is final. Bytes in staging are not given up for a source that has stopped answering.
4. A source that is slow comes after those that are not, and one that must be asked with less comes after those that need not.
5. Bytes that an earlier run left may be wrong without any source being at fault: then nobody is blamed and all start from byte 0.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from reconciler.core.errors import FetchError, HashMismatch, SizeMismatch
from reconciler.fetch import sources
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.sources import Failure

#: How a source is asked: over several connections, over one that continues what is there, or for the whole file in one plain request.
Mode = Literal["parallel", "single", "plain"]
_MODES: tuple[Mode, ...] = ("parallel", "single", "plain")
#: Sources that are used together at most.
MOST_TOGETHER = 8


class TrySources(Struct, frozen=True):
    """Probe these sources now."""

    urls: tuple[str, ...]


class RetryLater(Struct, frozen=True):
    """No source may be asked before *until*."""

    until: float


class GiveUp(Struct, frozen=True):
    """No source is left."""

    error: FetchError


class Blame(Struct, frozen=True):
    """What to log as an incident: which source (empty: not known which) failed how."""

    url: str
    failure: Failure


class _Source:
    def __init__(self, url: str, *, mirror: bool = False) -> None:
        self.url = url
        self.mirror = mirror
        self.open = True
        self.mode: Mode = "parallel"
        self.slow = False
        self.failures = 0
        self.retry_at = 0.0
        self.reported: set[str] = set()
        self.last: Failure | None = None


class SourceSelector:
    """The state of each source of one blob, and which is tried next."""

    def __init__(
        self, digest: str, urls: tuple[str, ...], settings: FetchSettings, *, together: bool = True, mirrors: tuple[str, ...] = ()
    ) -> None:
        self._digest, self._settings = digest, settings
        self._sources = {url: _Source(url, mirror=url in mirrors) for url in dict.fromkeys((*mirrors, *urls))}
        self._suspects: set[str] = set()
        self.together = together

    def next(self, now: float) -> TrySources | RetryLater | GiveUp:
        """Return what to do now."""
        left = [source for source in self._sources.values() if source.open]
        if not left:
            return GiveUp(self._error())
        ready = [source for source in left if source.retry_at <= now]
        if not ready:
            return RetryLater(min(source.retry_at for source in left))
        if mirrors := [source.url for source in ready if source.mirror]:
            return TrySources(tuple(mirrors[:1]))
        swift = [source for source in ready if not source.slow] or ready
        mode = min((source.mode for source in swift), key=_MODES.index)
        preferred = [source.url for source in swift if source.mode == mode]
        return TrySources(tuple(preferred[: MOST_TOGETHER if self.together and mode == "parallel" else 1]))

    def mode(self, url: str) -> Mode:
        """Return how the source *url* is asked."""
        return self._sources[url].mode

    def record_failure(
        self, urls: tuple[str, ...], failure: Failure, now: float, *, gained: bool = False, may_restart: bool = True
    ) -> list[Blame]:
        """
        Record that *urls* failed; return what was not reported yet.

        *gained*: more bytes are here than ever before. *may_restart*: to start from byte 0 loses nothing that a later run could use.
        """
        unreported = []
        for source in (self._sources[url] for url in urls):
            source.failures = 1 if gained else source.failures + 1
            source.last = failure
            pause = min(self._settings.backoff_seconds * 2 ** (source.failures - 1), self._settings.backoff_cap_seconds)
            source.retry_at = now + max(pause, failure.retry_after)
            exhausted = failure.permanent or source.failures >= self._settings.attempts
            if failure.retry_after > self._settings.backoff_cap_seconds:
                source.open = False
            elif exhausted and may_restart and not failure.final and source.mode != "plain":
                source.mode = "plain"
                source.retry_at = now + (0 if failure.permanent else max(pause, failure.retry_after))
            elif exhausted:
                source.open = False
            if failure.text not in source.reported:
                source.reported.add(failure.text)
                unreported.append(source.url)
        return [Blame(url, failure) for url in unreported]

    def record_interrupted(
        self, urls: tuple[str, ...], failure: Failure, now: float, *, gained: bool, may_restart: bool = True
    ) -> list[Blame]:
        """Record that a transfer from *urls* ended early. Of several it is not known which is at fault: each is tried alone then."""
        if len(urls) < 2:
            for source in (self._sources[url] for url in urls):
                source.mode = "single" if source.mode == "parallel" and not gained else source.mode
            return self.record_failure(urls, failure, now, gained=gained, may_restart=may_restart)
        self.together = gained
        return [] if gained else [Blame("", Failure(text=f"{failure.text}; {_tried_alone(urls)}", kind=failure.kind))]

    def record_slow(self, urls: tuple[str, ...], now: float, *, may_restart: bool = True) -> list[Blame]:
        """Record that *urls*, together, were slower than permitted: others come first now."""
        failure = Failure(text=f"slower than {self._settings.min_rate_bytes} bytes a second", permanent=False)
        if len(urls) > 1:
            return self.record_interrupted(urls, failure, now, gained=False)
        for url in urls:
            self._sources[url].slow = True
        others = any(source.open and not source.slow for source in self._sources.values())
        blames = self.record_failure(urls, failure, now, may_restart=may_restart)
        if others:
            return blames
        for url in urls:
            self._sources[url].slow = False
        return blames

    def record_wrong_bytes(self, urls: tuple[str, ...], failure: Failure, *, resumed: bool) -> list[Blame]:
        """Record that the bytes from *urls* (where *resumed*, with those of an earlier run) are not the blob."""
        if resumed:
            text = f"what an earlier run left was not good, starting from byte 0: {failure.text}"
            return [Blame("", Failure(text=text, kind=failure.kind))]
        if len(urls) > 1:
            self.together = False
            self._suspects = set(urls)
            return [Blame("", Failure(text=f"{failure.text}; {_tried_alone(urls)}", kind=failure.kind))]
        self._suspects -= set(urls)
        for source in (self._sources[url] for url in urls):
            source.last = failure
            if failure.kind == "size-mismatch" and source.mode != "plain":
                source.mode = "plain"  # the length of a range's answer says little about the file's
            else:
                source.open = False
        return [Blame(url, failure) for url in urls]

    def record_verified(self, urls: tuple[str, ...]) -> list[Blame]:
        """Record that *urls* gave the blob. Where two were suspected, the other one is at fault."""
        left = self._suspects - set(urls)
        if not self._suspects or len(left) != 1:
            return []
        failure = Failure(text="it gave other bytes than the blob's, together with sources that gave the right ones", kind="hash-mismatch")
        return [Blame(url, failure) for url in left]

    def _error(self) -> FetchError:
        if not self._sources:
            return FetchError(f"no source is named for {self._digest}")
        kinds = {source.last.kind for source in self._sources.values() if source.last}
        reasons = [f"{sources.redact(it.url)}: {it.last.text}" for it in self._sources.values() if it.last]
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        kind = HashMismatch if "hash-mismatch" in kinds else SizeMismatch if "size-mismatch" in kinds else FetchError
        return kind(f"no source gave {self._digest}: {'; '.join(reasons[:3])}{more}")


def _tried_alone(urls: tuple[str, ...]) -> str:
    return f"several were used together, each is tried alone now: {', '.join(sources.redact(url) for url in urls)}"
