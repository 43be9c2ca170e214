"""
The course that one blob takes over its sources. Decisions only: no clock, no file, no socket.

Rules that hold here:

1. All good sources are used together, until bytes that came from several prove wrong, or a shared transfer fails without having gained
   anything; from then on one at a time, so that each is answerable for what it does. After wrong bytes, from byte 0.
2. A source that lied is not asked again in this run. One that failed is, ``attempts`` times, with a growing pause between; bytes that
   were gained start the count anew, and they are counted by the furthest point ever reached, so that this ends.
3. A source that is slow comes after those that are not.
4. Bytes that an earlier run left may be wrong without any source being at fault: then nobody is blamed and all start from byte 0.
"""

from __future__ import annotations

from msgspec import Struct

from reconciler.core.errors import FetchError, HashMismatch, SizeMismatch
from reconciler.fetch import sources
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.sources import Failure

#: Sources that are used together at most.
MOST_TOGETHER = 8


class TrySources(Struct, frozen=True):
    """TrySources these sources whether they have the blob."""

    urls: tuple[str, ...]


class RetryLater(Struct, frozen=True):
    """Every source that is left wants to be left alone until then."""

    until: float


class GiveUp(Struct, frozen=True):
    """No source is left."""

    error: FetchError


class Blame(Struct, frozen=True):
    """What to log: which source (none, where it is not known) did what."""

    url: str
    failure: Failure


class _Source:
    def __init__(self, url: str) -> None:
        self.url = url
        self.open = True
        self.slow = False
        self.failures = 0
        self.retry_at = 0.0
        self.reported: set[str] = set()
        self.last: Failure | None = None


class SourceSelector:
    """What is known of each source of one blob, and what follows from it."""

    def __init__(self, digest: str, urls: tuple[str, ...], settings: FetchSettings, *, together: bool = True) -> None:
        self._digest, self._settings = digest, settings
        self._sources = {url: _Source(url) for url in urls}
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
        preferred = [source for source in ready if not source.slow] or ready
        return TrySources(tuple(source.url for source in preferred[: MOST_TOGETHER if self.together else 1]))

    def record_failure(self, urls: tuple[str, ...], failure: Failure, now: float, *, gained: bool = False) -> list[Blame]:
        """Take note that *urls* failed; *gained*: more bytes are here than ever before. Return what is new about it."""
        unreported = []
        for source in (self._sources[url] for url in urls):
            source.failures = 1 if gained else source.failures + 1
            source.last = failure
            pause = min(self._settings.backoff_seconds * 2 ** (source.failures - 1), self._settings.backoff_cap_seconds)
            source.retry_at = now + max(pause, failure.retry_after)
            too_long = failure.retry_after > self._settings.backoff_cap_seconds
            if failure.permanent or too_long or source.failures >= self._settings.attempts:
                source.open = False
            if failure.text not in source.reported:
                source.reported.add(failure.text)
                unreported.append(source.url)
        return [Blame(url, failure) for url in unreported]

    def record_interrupted(self, urls: tuple[str, ...], failure: Failure, now: float, *, gained: bool) -> list[Blame]:
        """Take note that a transfer from *urls* ended early. Of several, nobody knows which is at fault: each is tried alone then."""
        if len(urls) < 2:
            return self.record_failure(urls, failure, now, gained=gained)
        self.together = gained
        return [] if gained else [Blame("", Failure(text=f"{failure.text}; {_tried_alone(urls)}", kind=failure.kind))]

    def record_slow(self, urls: tuple[str, ...], now: float) -> list[Blame]:
        """Take note that *urls*, together, were slower than permitted: others come first now."""
        failure = Failure(text=f"slower than {self._settings.min_rate_bytes} bytes a second", permanent=False)
        if len(urls) > 1:
            return self.record_interrupted(urls, failure, now, gained=False)
        for url in urls:
            self._sources[url].slow = True
        others = any(source.open and not source.slow for source in self._sources.values())
        blames = self.record_failure(urls, failure, now)
        if others:
            return blames
        for url in urls:
            self._sources[url].slow = False
        return blames

    def record_wrong_bytes(self, urls: tuple[str, ...], failure: Failure, *, resumed: bool) -> list[Blame]:
        """Take note that what *urls* gave, together and with what was there before where *resumed*, is not the blob."""
        if resumed:
            text = f"what an earlier run left was not good, starting from byte 0: {failure.text}"
            return [Blame("", Failure(text=text, kind=failure.kind))]
        if len(urls) > 1:
            self.together = False
            self._suspects = set(urls)
            return [Blame("", Failure(text=f"{failure.text}; {_tried_alone(urls)}", kind=failure.kind))]
        self._suspects -= set(urls)
        for url in urls:
            self._sources[url].open = False
            self._sources[url].last = failure
        return [Blame(url, failure) for url in urls]

    def record_verified(self, urls: tuple[str, ...]) -> list[Blame]:
        """Take note that *urls* gave the blob: where two were suspected, the other is the one that lied."""
        left = self._suspects - set(urls)
        if not self._suspects or len(left) != 1:
            return []
        failure = Failure(text="it gave other bytes than the blob's, beside sources that were honest", kind="hash-mismatch")
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
