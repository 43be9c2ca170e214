"""
Servers that send wrong bytes, stall, or redirect elsewhere.

For each: no unverified byte is handed on, the run ends, another blob from an honest server arrives, and the incident names the source and
the cause. With one honest mirror the blob itself arrives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.fetch.settings import FetchSettings
from reconciler.ports import FetchFailed
from tests import hostile_server as bad
from tests.fetching import DIRECT, FAST, LARGE, SMALL, EventRecorder, collect, files_under, good, my_aria2, name_of, some, want
from tests.hostile_server import Behaviour, HostileServer, honest


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer() as running:
        yield running


@contextlib.contextmanager
def fetching(staging: Path, settings: FetchSettings = FAST) -> Iterator[Aria2Fetcher]:
    fetcher = Aria2Fetcher(staging, settings)
    try:
        yield fetcher
    finally:
        fetcher.close()
    assert my_aria2() == []


def _late(evil: Behaviour, data: bytes) -> Behaviour:
    """Answer probes for the first byte honestly, and the downloader like *evil*."""
    return bad.on_probe(honest(data), evil)


DATA = some(LARGE, 1)
LIE = bad.other(DATA)
OTHER = some(LARGE, 2)

#: Name, behaviour, the incident's kind, a word of its text.
MATRIX: list[tuple[str, Behaviour, str, str]] = [
    ("other bytes", honest(LIE), "hash-mismatch", "hash to"),
    ("all zeros", honest(bytes(LARGE)), "hash-mismatch", "hash to"),
    ("other bytes to the downloader alone", _late(honest(LIE), DATA), "hash-mismatch", "hash to"),
    ("longer", honest(DATA + b"x"), "size-mismatch", "not the signed"),
    ("shorter", honest(DATA[:-1]), "size-mismatch", "not the signed"),
    ("empty", bad.with_length(b"", 0), "size-mismatch", "not the signed"),
    ("longer to the downloader alone", _late(honest(DATA + b"x" * 4096), DATA), "size-mismatch", "another length"),
    ("shorter to the downloader alone", _late(honest(DATA[:-4096]), DATA), "size-mismatch", "another length"),
    ("a length too large", bad.with_length(DATA, LARGE + 9), "size-mismatch", "not the signed"),
    ("a body cut short", bad.with_length(DATA[: LARGE // 2], LARGE), "source-failed", ""),
    ("a negative length", bad.with_length(DATA, -1), "source-failed", "Content-Length"),
    ("a length that is no number", bad.with_length(DATA, "lots"), "source-failed", "Content-Length"),
    ("two lengths", bad.with_length(DATA, LARGE, LARGE + 1), "source-failed", "two different"),
    ("no length, other bytes", bad.with_length(LIE), "hash-mismatch", "hash to"),
    ("no length, too short", bad.with_length(DATA[:-5]), "size-mismatch", ""),
    ("HTTP/1.0, other bytes", bad.ancient(LIE), "hash-mismatch", "hash to"),
    ("endless", bad.endless, "size-mismatch", "another length"),
    ("endless to the downloader alone", _late(bad.endless, DATA), "size-mismatch", "another length"),
    ("a range next to the one asked for", bad.wrong_range(DATA), "source-failed", "not asked for"),
    ("a wrong range to the downloader alone", _late(bad.wrong_range(DATA), DATA), "source-failed", ""),
    ("several parts", bad.multipart(DATA), "source-failed", "several parts"),
    ("several parts to the downloader alone", _late(bad.multipart(DATA), DATA), "size-mismatch", ""),
    ("reset at once", bad.reset_after(DATA, 0), "source-failed", ""),
    ("reset at once to the downloader alone", _late(bad.reset_after(DATA, 0), DATA), "source-failed", ""),
    ("silent", bad.silent, "source-failed", "did not answer in time"),
    ("silent to the downloader alone", _late(bad.silent, DATA), "source-failed", ""),
    ("slow headers", bad.slow_headers, "source-failed", "did not answer in time"),
    ("slow headers to the downloader alone", _late(bad.slow_headers, DATA), "source-failed", ""),
    ("a drip", _late(honest(DATA, rate=200), DATA), "source-failed", "slow"),
    ("stalls after a while", _late(bad.stall_after(DATA, 300_000), DATA), "source-failed", ""),
    ("a header of 100 MB", bad.huge_header, "source-failed", "no HTTP"),
    ("a header of 100 MB to the downloader alone", _late(bad.huge_header, DATA), "source-failed", ""),
    ("garbage", bad.garbage, "source-failed", "no HTTP"),
    ("gzip", bad.gzipped(DATA), "source-failed", "gzip"),
    ("gzip to the downloader alone", _late(bad.gzipped(LIE), DATA), "hash-mismatch", ""),
    ("a login page", bad.login_page, "source-failed", "a login page or a proxy?"),
    ("a login page without a length", bad.unsized(bad.LOGIN_PAGE), "source-failed", "a login page or a proxy?"),
    ("a login page to the downloader alone", _late(bad.login_page, DATA), "size-mismatch", ""),
    ("metalink", bad.metalink("http://127.0.0.1:1/evil", DATA), "hash-mismatch", "hash to"),
    *[(f"status {code}", bad.status(code), kind, f"HTTP {code}") for code, kind in (
        (400, "source-failed"), (401, "source-failed"), (403, "source-failed"), (404, "source-failed"), (410, "source-failed"),
        (416, "size-mismatch"), (418, "source-failed"), (429, "source-failed"), (500, "source-failed"), (503, "source-failed"),
        (204, "source-failed"), (304, "source-failed"),
    )],
    *[(f"status {code} to the downloader alone", _late(bad.status(code), DATA), "source-failed", "") for code in (403, 404, 429, 503)],
    ("redirects in a circle", bad.redirect("/evil"), "source-failed", "redirects more than"),
    ("a redirect to a file", bad.redirect("file:///etc/passwd"), "source-failed", "not http"),
    ("a redirect to ftp", bad.redirect("ftp://127.0.0.1/x"), "source-failed", "not http"),
    ("a redirect with a user", bad.redirect("http://user:word@127.0.0.1/x"), "source-failed", "no user"),
    ("a redirect with a backslash", bad.redirect("http:\\\\127.0.0.1\\x"), "source-failed", "no URL"),
    ("a redirect to another host", bad.redirect("https://elsewhere.example/x"), "source-failed", "not among the allowed hosts"),
    ("a redirect to cloud metadata", bad.redirect("http://169.254.169.254/latest"), "source-failed", "not among the allowed hosts"),
    ("a redirect to nowhere", bad.status(302), "source-failed", "without saying where"),
    ("a redirect in a circle to the downloader alone", _late(bad.redirect("/evil"), DATA), "source-failed", ""),
    ("a redirect to a file to the downloader alone", _late(bad.redirect("file:///etc/passwd"), DATA), "source-failed", ""),
]  # fmt: skip
NAMES = [name for name, *_ in MATRIX]


@pytest.mark.parametrize(("_name", "evil", "kind", "word"), MATRIX, ids=NAMES)
def test_nothing_of_a_hostile_server_is_handed_on(
    tmp_path: Path, server: HostileServer, _name: str, evil: Behaviour, kind: str, word: str
) -> None:
    url = server.on("/evil", evil)
    fine = server.on("/fine", honest(OTHER))
    recorder = EventRecorder()
    with fetching(tmp_path) as fetcher:
        outcomes = collect(fetcher, [want(DATA, url), want(OTHER, fine)], recorder)
        good(outcomes[name_of(OTHER)], OTHER)
        failed = outcomes[name_of(DATA)]
    assert isinstance(failed, FetchFailed), failed
    assert url in failed.error.message
    incidents = [it for it in recorder.incidents if it.blob == name_of(DATA)]
    assert {it.source for it in incidents} == {url}
    assert kind in {it.kind for it in incidents}
    assert any(word in it.detail for it in incidents), incidents
    for path in files_under(tmp_path):
        if path.name == "data" and path.stat().st_size == LARGE:
            assert path.read_bytes() == OTHER


@pytest.mark.parametrize(("_name", "evil", "kind", "word"), MATRIX, ids=NAMES)
def test_one_honest_mirror_among_liars_is_enough(
    tmp_path: Path, server: HostileServer, _name: str, evil: Behaviour, kind: str, word: str
) -> None:
    urls = (server.on("/evil", evil), server.on("/gone", bad.status(404)), server.on("/true", honest(DATA)))
    recorder = EventRecorder()
    with fetching(tmp_path) as fetcher:
        good(collect(fetcher, [want(DATA, *urls)], recorder)[name_of(DATA)], DATA)


SHORT = DATA[:SMALL]
DIRECT_MATRIX: list[tuple[str, Behaviour, str, str]] = [
    ("other bytes", honest(some(SMALL, 9)), "hash-mismatch", "hash to"),
    ("longer", honest(SHORT + b"x"), "size-mismatch", "not the signed"),
    ("a body cut short", bad.with_length(SHORT[:100], SMALL), "source-failed", ""),
    ("no length, too long", bad.with_length(SHORT + b"x" * 9999), "size-mismatch", "more than"),
    ("endless", bad.endless, "size-mismatch", "more than"),
    ("reset", bad.reset_after(SHORT, 100), "source-failed", ""),
    ("silent", bad.silent, "source-failed", "did not answer"),
    ("slow headers", bad.slow_headers, "source-failed", "did not answer"),
    ("stalls", bad.stall_after(SHORT, 100), "source-failed", ""),
    ("a drip", honest(SHORT, rate=200), "source-failed", ""),
    ("gzip", bad.gzipped(SHORT), "source-failed", "gzip"),
    ("a wrong range", bad.wrong_range(SHORT), "source-failed", "not asked for"),
    ("404", bad.status(404), "source-failed", "404"),
    ("a login page", bad.login_page, "source-failed", "a login page or a proxy?"),
    ("a login page without a length", bad.unsized(bad.LOGIN_PAGE), "source-failed", "a login page or a proxy?"),
    ("a long login page without a length", bad.unsized(bad.LOGIN_PAGE + b" " * SMALL), "source-failed", "a login page or a proxy?"),
]


@pytest.mark.parametrize(("_name", "evil", "kind", "word"), DIRECT_MATRIX, ids=[name for name, *_ in DIRECT_MATRIX])
def test_small_blobs_are_fetched_by_the_same_rules(
    tmp_path: Path, server: HostileServer, _name: str, evil: Behaviour, kind: str, word: str
) -> None:
    url, fine = server.on("/evil", evil), server.on("/true", honest(SHORT))
    beside = OTHER[:SMALL]
    recorder = EventRecorder()
    settings = msgspec.structs.replace(DIRECT, min_rate_bytes=1 << 16)
    with fetching(tmp_path, settings) as fetcher:
        outcomes = collect(fetcher, [want(SHORT, url), want(beside, server.on("/beside", honest(beside)))], recorder)
        good(outcomes[name_of(beside)], beside)
        assert isinstance(outcomes[name_of(SHORT)], FetchFailed)
        good(collect(fetcher, [want(SHORT, url, fine)])[name_of(SHORT)], SHORT)
    assert {it.source for it in recorder.incidents} == {url}
    assert kind in recorder.kinds()
    assert any(word in it.detail for it in recorder.incidents), recorder.incidents


def test_contents_that_change_on_resume_are_not_mixed(tmp_path: Path, server: HostileServer) -> None:
    """The first connection gives the front of one file and breaks; later ones give another file's rest, with another ETag."""
    url = server.on("/x", bad.on_probe(honest(DATA), bad.first(bad.reset_after(DATA, LARGE // 2), honest(OTHER, etag="b"))))
    recorder = EventRecorder()
    with fetching(tmp_path) as fetcher:
        assert isinstance(collect(fetcher, [want(DATA, url)], recorder)[name_of(DATA)], FetchFailed)
        good(collect(fetcher, [want(DATA, url, server.on("/true", honest(DATA)))])[name_of(DATA)], DATA)
    assert "hash-mismatch" in recorder.kinds()


def test_a_reset_is_continued_and_not_begun_again(tmp_path: Path, server: HostileServer) -> None:
    url = server.on("/x", bad.on_probe(honest(DATA), bad.first(bad.reset_after(DATA, 700_000), honest(DATA), times=6)))
    with fetching(tmp_path) as fetcher:
        good(collect(fetcher, [want(DATA, url)])[name_of(DATA)], DATA)


def test_a_server_without_ranges_serves_the_blob(tmp_path: Path, server: HostileServer) -> None:
    with fetching(tmp_path) as fetcher:
        for path, behaviour in (("/whole", bad.no_ranges(DATA)), ("/old", bad.ancient(DATA)), ("/chunked", bad.chunked(DATA))):
            good(collect(fetcher, [want(DATA, server.on(path, behaviour))])[name_of(DATA)], DATA).path.unlink()


def test_a_server_that_stops_honouring_ranges_is_started_from_byte_0(tmp_path: Path, server: HostileServer) -> None:
    """aria2 by itself ends with error 8 each time."""
    path = tmp_path / name_of(DATA).replace(":", "-") / "left"
    path.mkdir(parents=True)
    (path / "data").write_bytes(DATA[: 2 << 20])
    with fetching(tmp_path) as fetcher:
        url = server.on("/x", _late(bad.no_ranges(DATA), DATA))
        good(collect(fetcher, [want(DATA, url)])[name_of(DATA)], DATA)


def test_the_liar_among_mixed_mirrors_is_named(tmp_path: Path, server: HostileServer) -> None:
    big = some(12 << 20, 5)
    wrong = bytes(byte ^ 1 for byte in big)
    for order in (("/lie", "/true"), ("/true", "/lie")):
        # At this rate neither is done before the other has begun.
        urls = {path: server.on(path, honest(data, rate=4 << 20)) for path, data in (("/lie", wrong), ("/true", big))}
        recorder = EventRecorder()
        with fetching(tmp_path) as fetcher:
            outcome = good(collect(fetcher, [want(big, *(urls[path] for path in order))], recorder)[name_of(big)], big)
            outcome.path.unlink()
        assert {it.source for it in recorder.incidents if it.source} == {urls["/lie"]}
        assert outcome.sources == (urls["/true"],)


def test_mirrors_are_used_together(tmp_path: Path, server: HostileServer) -> None:
    big = some(16 << 20, 6)
    urls = [server.on(f"/{index}", honest(big, rate=16 << 20)) for index in range(3)]
    with fetching(tmp_path) as fetcher:
        good(collect(fetcher, [want(big, *urls)])[name_of(big)], big)
    assert all(server.sent(f"/{index}") > 1 for index in range(3))


def test_a_mirror_that_answers_late_is_there_when_the_first_one_breaks(tmp_path: Path, server: HostileServer) -> None:
    big = some(16 << 20, 6)
    calls = 12

    def late(it: bad.Exchange) -> None:
        server.rest(0.7)
        honest(big)(it)

    slowly = honest(big, rate=1 << 20)
    first = server.on("/first", bad.on_probe(slowly, bad.first(slowly, bad.reset_after(big, 1000), times=calls)))
    second = server.on("/second", bad.on_probe(late, honest(big)))
    with fetching(tmp_path) as fetcher:
        outcome = good(collect(fetcher, [want(big, first, second)])[name_of(big)], big)
    assert outcome.sources == (first, second)
    assert server.sent("/second") > 1


def test_hashing_follows_the_download(tmp_path: Path, server: HostileServer) -> None:
    big = some(12 << 20, 7)
    recorder = EventRecorder()
    with fetching(tmp_path) as fetcher:
        good(collect(fetcher, [want(big, server.on("/x", honest(big, rate=2 << 20)))], recorder)[name_of(big)], big)
    assert any(0 < event.hashed <= event.done < event.total for event in recorder.progress)


def test_a_slow_source_is_left_for_the_next(tmp_path: Path, server: HostileServer) -> None:
    slow = server.on("/slow", bad.on_probe(honest(DATA), honest(DATA, rate=20_000)))
    # The second answers too late to be used together with the first.
    settings = msgspec.structs.replace(FAST, min_rate_bytes=4 << 20)
    recorder = EventRecorder()
    with fetching(tmp_path, settings) as fetcher:
        late = server.on("/fast", bad.first(bad.status(503, ("Retry-After", "0")), honest(DATA)))
        good(collect(fetcher, [want(DATA, slow, late)], recorder)[name_of(DATA)], DATA)
    assert any(it.source == slow and "slower than" in it.detail for it in recorder.incidents)


def test_retry_after_is_kept_to(tmp_path: Path, server: HostileServer) -> None:
    settings = msgspec.structs.replace(FAST, backoff_cap_seconds=5.0)
    url = server.on("/x", bad.first(bad.status(429, ("Retry-After", "1")), honest(DATA)))
    with fetching(tmp_path, settings) as fetcher:
        good(collect(fetcher, [want(DATA, url)])[name_of(DATA)], DATA)


def test_a_retry_after_of_an_hour_is_left_to_the_next_run(tmp_path: Path, server: HostileServer) -> None:
    url = server.on("/x", bad.status(429, ("Retry-After", "3600")))
    with fetching(tmp_path) as fetcher:
        assert isinstance(collect(fetcher, [want(DATA, url)])[name_of(DATA)], FetchFailed)
    assert len(server.asked("/x")) == 1


def test_a_source_that_failed_for_good_is_not_asked_again(tmp_path: Path, server: HostileServer) -> None:
    url = server.on("/x", bad.status(404))
    with fetching(tmp_path) as fetcher:
        collect(fetcher, [want(DATA, url)])
    assert len(server.asked("/x")) == 1


def test_a_redirect_after_the_question_leads_nowhere_else(tmp_path: Path, server: HostileServer) -> None:
    """The probe is answered honestly, and the downloader is redirected to another host: it cannot reach it."""
    with HostileServer() as elsewhere:
        there = elsewhere.on("/stolen", honest(DATA))
        away = there.replace("127.0.0.1", "localhost")
        url = server.on("/x", _late(bad.redirect(away), DATA))
        with fetching(tmp_path) as fetcher:
            assert isinstance(collect(fetcher, [want(DATA, url)])[name_of(DATA)], FetchFailed)
        assert elsewhere.requests == []


def test_an_allowed_redirect_is_followed_by_us_alone(tmp_path: Path, server: HostileServer) -> None:
    target = server.on("/target", honest(DATA))
    url = server.on("/x", bad.redirect(target))
    with fetching(tmp_path) as fetcher:
        good(collect(fetcher, [want(DATA, url)])[name_of(DATA)], DATA)
    assert len(server.asked("/x")) == 1
    assert server.sent("/target") >= LARGE


def test_five_redirects_are_followed_and_six_are_not(tmp_path: Path, server: HostileServer) -> None:
    server.on("/0", honest(DATA))
    for step in range(1, 7):
        server.on(f"/{step}", bad.redirect(f"/{step - 1}"))
    with fetching(tmp_path) as fetcher:
        assert isinstance(collect(fetcher, [want(DATA, server.url("/6"))])[name_of(DATA)], FetchFailed)
        good(collect(fetcher, [want(DATA, server.url("/5"))])[name_of(DATA)], DATA)


def test_an_endless_answer_is_stopped_long_before_the_disk_is_full(tmp_path: Path, server: HostileServer) -> None:
    url = server.on("/x", _late(bad.endless, DATA))
    with fetching(tmp_path) as fetcher:
        assert isinstance(collect(fetcher, [want(DATA, url)])[name_of(DATA)], FetchFailed)
    assert sum(path.stat().st_size for path in files_under(tmp_path)) <= LARGE + (1 << 20)


def test_what_servers_say_reaches_people_without_secrets_and_control_characters(tmp_path: Path, server: HostileServer) -> None:
    server.on("/x", bad.redirect("https://\x1b[31mred.example/?token=hush"))
    url = server.url("/x") + "?signature=hush"
    recorder = EventRecorder()
    with fetching(tmp_path) as fetcher:
        outcome = collect(fetcher, [want(DATA, url)], recorder)[name_of(DATA)]
    assert isinstance(outcome, FetchFailed)
    text = outcome.error.message + repr(recorder.incidents)
    assert "hush" not in text
    assert "\x1b" not in text


def test_progress_is_at_most_ten_events_a_second(tmp_path: Path, server: HostileServer) -> None:
    import time

    blobs = [some(3 << 20, seed) for seed in range(4)]
    times: list[float] = []

    class Timed(EventRecorder):
        def __call__(self, event: object, /) -> None:
            super().__call__(event)  # type: ignore[arg-type]
            times.append(time.monotonic())

    recorder = Timed()
    wants = [want(data, server.on(f"/{index}", honest(data, rate=1 << 20))) for index, data in enumerate(blobs)]
    with fetching(tmp_path) as fetcher:
        collect(fetcher, wants, recorder)
    progress = [at for at, event in zip(times, recorder.events, strict=True) if event in recorder.progress]
    assert len(progress) > 1
    assert all(later - earlier >= 0.09 for earlier, later in zip(progress, progress[10:], strict=False))
    assert all(later - earlier > 0.9 for earlier, later in zip(progress, progress[10:], strict=False))
    assert {event.digest for event in recorder.progress} == {it.digest for it in wants}
