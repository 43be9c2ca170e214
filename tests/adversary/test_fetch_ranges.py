"""
Servers whose ranges lie, fail or are rationed: a source is exhausted only when one plain request from byte 0 has failed too.

Each of them gives the whole file to whoever asks for it plainly, over one connection.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.fetch.settings import FetchSettings
from reconciler.ports import FetchFailed
from tests import hostile_server as bad
from tests.fetching import DIRECT, FAST, LARGE, SMALL, collect, good, some, want
from tests.hostile_server import Behaviour, Exchange, HostileServer

DATA = some(LARGE, 1)
SHORT = some(SMALL, 2)
#: Bytes a second at which large files are sent: other connections begin before the first one is done.
RATE = 6 << 20
#: Within so many seconds a server notices that a client is gone.
NOTICED = 0.25


def honest(data: bytes) -> Behaviour:
    return bad.honest(data, rate=RATE if len(data) == LARGE else 0)


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer() as made:
        yield made


def on_ranges(behaviour: Behaviour, *, but_the_first_byte: bool = False) -> Callable[[bytes], Behaviour]:
    """Serve whoever asks plainly (and *but_the_first_byte*, who asks for that alone); behave otherwise to whoever asks for a range."""

    def made(data: bytes) -> Behaviour:
        def behave(it: Exchange) -> None:
            refused = it.range is not None and not (but_the_first_byte and it.is_probe)
            (behaviour if refused else honest(data))(it)

        return behave

    return made


def one_at_a_time(refuse: Behaviour, *, ranges_only: bool = False) -> Callable[[bytes], Behaviour]:
    """Serve one request at a time; refuse those that come meanwhile."""

    def made(data: bytes) -> Behaviour:
        busy = threading.Lock()

        def behave(it: Exchange) -> None:
            if ranges_only and it.range is None:
                honest(data)(it)
            elif busy.acquire(timeout=NOTICED):
                try:
                    honest(data)(it)
                finally:
                    busy.release()
            else:
                refuse(it)

        return behave

    return made


def short_ranges(most: int) -> Callable[[bytes], Behaviour]:
    """Answer a long range with its first *most* bytes, as RFC 9110 15.3.7 permits."""

    def made(data: bytes) -> Behaviour:
        def behave(it: Exchange) -> None:
            if it.range is None:
                honest(data)(it)
                return
            start, last = it.range
            last = min(len(data) - 1 if last is None else last, len(data) - 1, start + most - 1)
            it.head(206, ("Content-Length", last - start + 1), ("Content-Range", f"bytes {start}-{last}/{len(data)}"))
            it.body(memoryview(data)[start : last + 1])

        return behave

    return made


def refuses_long_ranges(data: bytes) -> Behaviour:
    def behave(it: Exchange) -> None:
        start, last = it.range or (0, 0)
        long = it.range is not None and (len(data) - 1 if last is None else last) - start >= 100
        (bad.status(416) if long else honest(data))(it)

    return behave


def unannounced(data: bytes) -> Behaviour:
    """Say that there are no ranges, and give the whole file whatever is asked for."""

    def behave(it: Exchange) -> None:
        it.head(200, ("Content-Length", len(data)), ("Accept-Ranges", "none"))
        it.body(data)

    return behave


def no_head(data: bytes) -> Behaviour:
    return lambda it: (bad.status(405) if it.method == "HEAD" else honest(data))(it)


def partial_without_range(it: Exchange) -> None:
    it.head(206, ("Content-Length", 1))
    it.body(b"x")


LIARS: dict[str, Callable[[bytes], Behaviour]] = {
    "every range but the first byte is refused with 416": on_ranges(bad.status(416), but_the_first_byte=True),
    "every range is refused with 416": on_ranges(bad.status(416)),
    "412": on_ranges(bad.status(412), but_the_first_byte=True),
    "400 at once": on_ranges(bad.status(400)),
    "403": on_ranges(bad.status(403), but_the_first_byte=True),
    "501 at once": on_ranges(bad.status(501)),
    "500": on_ranges(bad.status(500), but_the_first_byte=True),
    "another range": lambda data: on_ranges(bad.wrong_range(data))(data),
    "another range than the second": lambda data: on_ranges(bad.wrong_range(data), but_the_first_byte=True)(data),
    "several parts": lambda data: on_ranges(bad.multipart(data))(data),
    "a part that says not which": on_ranges(partial_without_range),
    "a login page": on_ranges(bad.login_page, but_the_first_byte=True),
    "200 to a later range": lambda data: on_ranges(bad.no_ranges(data), but_the_first_byte=True)(data),
    "a reset": on_ranges(Exchange.reset, but_the_first_byte=True),
    "silence": on_ranges(bad.silent, but_the_first_byte=True),
    "no HTTP": on_ranges(bad.garbage),
    "429 for parallel requests": one_at_a_time(bad.status(429)),
    "503 for parallel requests": one_at_a_time(bad.status(503, ("Retry-After", 1))),
    "403 for parallel requests": one_at_a_time(bad.status(403)),
    "429 for parallel ranges": one_at_a_time(bad.status(429), ranges_only=True),
    "a reset for parallel requests": one_at_a_time(Exchange.reset),
    "short ranges": short_ranges(100_000),
    "416 for long ranges": refuses_long_ranges,
    "Accept-Ranges: none": unannounced,
    "HEAD refused": no_head,
}


def leave(staging: Path, digest: str, data: bytes) -> Path:
    """Leave *data* where an earlier run would have."""
    folder = staging / digest.replace(":", "-") / "left"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "data").write_bytes(data)
    return folder / "data"


@pytest.mark.parametrize(
    ("settings", "data", "left"),
    [(FAST, DATA, 0), (FAST, DATA, 2 << 20), (FAST, SHORT, 0), (DIRECT, SHORT, 0)],
    ids=["large", "continued", "small", "direct"],
)
@pytest.mark.parametrize("liar", LIARS.values(), ids=LIARS)
def test_a_source_whose_ranges_lie_gives_the_blob(
    tmp_path: Path, server: HostileServer, liar: Callable[[bytes], Behaviour], settings: FetchSettings, data: bytes, left: int
) -> None:
    wanted = want(data, server.on("/x", liar(data)))
    if left:
        leave(tmp_path / "s", wanted.digest, data[:left])
    with contextlib.closing(Aria2Fetcher(tmp_path / "s", settings)) as fetcher:
        good(collect(fetcher, [wanted])[wanted.digest], data)


@pytest.mark.parametrize("left", [0, 2 << 20])
def test_ranges_that_are_not_found_later_are_no_missing_file(tmp_path: Path, server: HostileServer, left: int) -> None:
    wanted = want(DATA, server.on("/x", on_ranges(bad.status(404), but_the_first_byte=True)(DATA)))
    leave(tmp_path / "s", wanted.digest, DATA[:left])
    with contextlib.closing(Aria2Fetcher(tmp_path / "s", FAST)) as fetcher:
        good(collect(fetcher, [wanted])[wanted.digest], DATA)


@pytest.mark.parametrize("status", [401, 404, 410, 451])
@pytest.mark.parametrize(("settings", "data"), [(FAST, DATA), (DIRECT, SHORT)], ids=["aria2", "direct"])
def test_a_file_that_is_not_there_is_asked_for_once(
    tmp_path: Path, server: HostileServer, status: int, settings: FetchSettings, data: bytes
) -> None:
    wanted = want(data, server.on("/x", bad.status(status)))
    with contextlib.closing(Aria2Fetcher(tmp_path / "s", settings)) as fetcher:
        assert isinstance(collect(fetcher, [wanted])[wanted.digest], FetchFailed)
    assert len(server.requests) == 1


@pytest.mark.parametrize("behaviour", [bad.status(416), bad.status(500), bad.login_page, bad.garbage, Exchange.reset])
@pytest.mark.parametrize(("settings", "data"), [(FAST, DATA), (DIRECT, SHORT)], ids=["aria2", "direct"])
def test_a_source_that_refuses_a_plain_request_too_is_exhausted(
    tmp_path: Path, server: HostileServer, behaviour: Behaviour, settings: FetchSettings, data: bytes
) -> None:
    wanted = want(data, server.on("/x", behaviour))
    with contextlib.closing(Aria2Fetcher(tmp_path / "s", settings)) as fetcher:
        assert isinstance(collect(fetcher, [wanted])[wanted.digest], FetchFailed)
    assert [it.range for it in server.requests].count(None) == 1
    assert server.requests[-1].range is None


@pytest.mark.parametrize("behaviour", [bad.status(503), Exchange.reset, bad.silent])
def test_bytes_are_not_given_up_for_a_source_that_stopped_answering(tmp_path: Path, server: HostileServer, behaviour: Behaviour) -> None:
    wanted = want(DATA, server.on("/x", bad.first(behaviour, bad.honest(DATA), times=FAST.attempts)))
    left = leave(tmp_path / "s", wanted.digest, DATA[: 3 << 20])
    with contextlib.closing(Aria2Fetcher(tmp_path / "s", FAST)) as fetcher:
        assert isinstance(collect(fetcher, [wanted])[wanted.digest], FetchFailed)
        assert left.read_bytes() == DATA[: 3 << 20]
        assert all(it.range == (0, 0) for it in server.requests)
        good(collect(fetcher, [wanted])[wanted.digest], DATA)


def test_a_liar_is_not_asked_plainly_where_an_honest_source_has_ranges(tmp_path: Path, server: HostileServer) -> None:
    liar, true = server.on("/lie", on_ranges(bad.status(416))(DATA)), server.on("/true", bad.honest(DATA))
    wanted = want(DATA, liar, true)
    with contextlib.closing(Aria2Fetcher(tmp_path / "s", FAST)) as fetcher:
        good(collect(fetcher, [wanted])[wanted.digest], DATA)
    assert [it.range for it in server.asked("/lie")] == [(0, 0)]
