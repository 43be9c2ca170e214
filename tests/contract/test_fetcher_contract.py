"""What every ``Fetcher`` guarantees: the one that uses aria2, with a real server, and the memory twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from reconciler.core.errors import HashMismatch, ReconcileError
from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.ports import Fetched, Fetcher, FetchFailed
from tests.fetching import DIRECT, FAST, LARGE, EventRecorder, collect, good, my_aria2, name_of, some, want
from tests.hostile_server import HostileServer, honest
from tests.twins.fetch import Internet, MemoryFetcher


@dataclass
class World:
    """A fetcher, and a way to give it sources."""

    fetcher: Fetcher
    #: Serves bytes at a path and returns the URL.
    serve: Callable[[str, bytes], str]
    #: A URL at which nobody answers.
    nowhere: str


@pytest.fixture(params=["aria2", "direct", "memory"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "memory":
        internet = Internet()

        def put(path: str, data: bytes) -> str:
            internet.pages[f"memory:{path}"] = data
            return f"memory:{path}"

        yield World(MemoryFetcher(tmp_path, internet), put, "memory:/nowhere")
        return
    with HostileServer() as server:
        fetcher = Aria2Fetcher(tmp_path, FAST if request.param == "aria2" else DIRECT)
        try:
            yield World(fetcher, lambda path, data: server.on(path, honest(data)), server.url("/nowhere"))
        finally:
            fetcher.close()


def test_each_want_has_one_outcome_and_its_bytes(world: World) -> None:
    blobs = [some(LARGE, 1), some(100_000, 2), some(1, 3), some(LARGE, 4)]
    wants = [want(data, world.serve(f"/{index}", data)) for index, data in enumerate(blobs)]
    outcomes = collect(world.fetcher, wants)
    for data in blobs:
        good(outcomes[name_of(data)], data)


def test_nothing_is_wanted_nothing_is_done(world: World) -> None:
    assert collect(world.fetcher, []) == {}


def test_a_second_fetch_with_the_same_object(world: World) -> None:
    for seed in (1, 2):
        data = some(LARGE, seed)
        good(collect(world.fetcher, [want(data, world.serve(f"/{seed}", data))])[name_of(data)], data)


def test_other_bytes_of_the_same_length_are_refused(world: World) -> None:
    data, lie = some(70_000, 1), some(70_000, 2)
    recorder = EventRecorder()
    url = world.serve("/lie", lie)
    outcome = collect(world.fetcher, [want(data, url)], recorder)[name_of(data)]
    assert isinstance(outcome, FetchFailed)
    assert isinstance(outcome.error, HashMismatch)
    assert [(it.kind, it.blob, it.source) for it in recorder.incidents] == [("hash-mismatch", name_of(data), url)]


def test_the_next_source_is_taken_and_the_liar_named(world: World) -> None:
    data, lie = some(70_000, 1), some(70_000, 2)
    recorder = EventRecorder()
    bad, fine = world.serve("/lie", lie), world.serve("/true", data)
    outcome = good(collect(world.fetcher, [want(data, bad, fine)], recorder)[name_of(data)], data)
    assert outcome.sources == (fine,)
    assert {(it.kind, it.source) for it in recorder.incidents} == {("hash-mismatch", bad)}


def test_another_length_is_refused(world: World) -> None:
    data = some(70_000, 1)
    for index, lie in enumerate((data[:-1], data + b"x")):
        recorder = EventRecorder()
        outcome = collect(world.fetcher, [want(data, world.serve(f"/{index}", lie))], recorder)[name_of(data)]
        assert isinstance(outcome, FetchFailed)
        assert recorder.kinds() == {"size-mismatch"}


def test_a_source_that_is_not_there_fails_its_blob_alone(world: World) -> None:
    data, lost = some(70_000, 1), some(70_000, 2)
    recorder = EventRecorder()
    outcomes = collect(world.fetcher, [want(lost, world.nowhere), want(data, world.serve("/x", data))], recorder)
    good(outcomes[name_of(data)], data)
    failed = outcomes[name_of(lost)]
    assert isinstance(failed, FetchFailed)
    assert isinstance(failed.error, ReconcileError)
    assert "source-failed" in recorder.kinds()


def test_no_source_at_all_is_a_failure(world: World) -> None:
    data = some(10, 1)
    assert isinstance(collect(world.fetcher, [want(data)])[name_of(data)], FetchFailed)


@pytest.mark.parametrize("algorithm", ["sha512", "blake3"])
def test_other_algorithms(world: World, algorithm: str) -> None:
    from reconciler.core import digest

    data = some(LARGE, 7)
    wanted = want(data, world.serve("/a", data))
    wanted = type(wanted)(digest=digest.of(data, algorithm), size=len(data), sources=wanted.sources)
    outcome = collect(world.fetcher, [wanted])[wanted.digest]
    assert isinstance(outcome, Fetched)
    assert outcome.path.read_bytes() == data


def test_closing_the_iterator_stops_and_the_next_fetch_goes_on(world: World) -> None:
    blobs = [some(LARGE, seed) for seed in range(3)]
    wants = [want(data, world.serve(f"/{index}", data)) for index, data in enumerate(blobs)]
    outcomes = world.fetcher.fetch(wants, EventRecorder())
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    again = collect(world.fetcher, wants)
    for data in blobs:
        good(again[name_of(data)], data)


def test_close_is_idempotent_and_leaves_no_process(world: World) -> None:
    data = some(LARGE, 1)
    collect(world.fetcher, [want(data, world.serve("/x", data))])
    world.fetcher.close()
    world.fetcher.close()
    assert my_aria2() == []
