"""Which hosts are left alone: within a run, and over several."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from reconciler.fetch import host_health
from reconciler.fetch.host_health import CIRCUIT_BLOBS, LEFT_ALONE, OPEN, HostHealth, HostRecord
from reconciler.fetch.resolver import Resolved
from reconciler.fetch.sources import Failure

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
URL, SAME_HOST, OTHER = "https://dead.example.org/a", "https://dead.example.org:443/b", "https://live.example.org/a"
SILENT = Failure(text="it did not answer in time", permanent=False)
GOOD = Resolved(url=URL, ranges=True)


def health(known: dict[str, HostRecord] | None = None, now: datetime = NOW, *, patient: bool = True, draw: float = 1.0) -> HostHealth:
    return HostHealth(known or {}, now, patient=patient, draw=lambda: draw)


def fail(hosts: HostHealth, blobs: int, failure: Failure = SILENT) -> None:
    for index in range(blobs):
        hosts.record(URL, f"blob {index}", failure, 0.0)


# -- in one run ------------------------------------------------------------------------------------------------


def test_a_thousand_blobs_do_not_each_wait_for_the_same_dead_host() -> None:
    hosts = health()
    asked = 0
    for index in range(1000):
        if hosts.refusal(URL, 0.0) is None:
            asked += 1
            hosts.record(URL, f"blob {index}", SILENT, 0.0)
    assert asked == CIRCUIT_BLOBS
    assert hosts.refusal(SAME_HOST, 0.0) is OPEN
    assert hosts.refusal(OTHER, 0.0) is None


def test_one_blob_that_fails_often_closes_its_host_to_nobody() -> None:
    hosts = health()
    for _ in range(100):
        hosts.record(URL, "blob", SILENT, 0.0)
    assert hosts.refusal(URL, 0.0) is None


def test_one_request_in_a_while_finds_out_whether_the_host_is_back() -> None:
    hosts = health()
    fail(hosts, CIRCUIT_BLOBS)
    assert hosts.refusal(URL, 29.0) is OPEN
    assert hosts.refusal(URL, 31.0) is None
    assert hosts.refusal(URL, 31.0) is OPEN
    hosts.record(URL, "blob", GOOD, 32.0)
    assert hosts.refusal(URL, 32.0) is None


@pytest.mark.parametrize("failure", [Failure(text="HTTP 404"), Failure(text="wrong", kind="hash-mismatch")])
def test_a_host_that_answers_is_there_whatever_it_answers(failure: Failure) -> None:
    hosts = health()
    fail(hosts, CIRCUIT_BLOBS - 1)
    hosts.record(URL, "another", failure, 0.0)
    fail(hosts, CIRCUIT_BLOBS - 1)
    assert hosts.refusal(URL, 0.0) is None
    assert hosts.after() == {}


# -- over several runs -------------------------------------------------------------------------------------------


def runs(count: int, draw: float = 1.0) -> dict[str, HostRecord]:
    known: dict[str, HostRecord] = {}
    for _ in range(count):
        hosts = health(known, draw=draw)
        fail(hosts, 1)
        known = hosts.after()
    return known


def test_after_one_failed_run_the_next_may_ask_at_once() -> None:
    assert health(runs(1)).refusal(URL, 0.0) is None


def test_the_wait_doubles_with_each_failed_run_up_to_an_hour() -> None:
    waits = [(runs(count)["dead.example.org:443"].retry_at - NOW).total_seconds() for count in range(1, 12)]
    assert waits == [0, 30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def test_the_wait_is_drawn_from_the_whole_span() -> None:
    assert (runs(5, draw=0.25)["dead.example.org:443"].retry_at - NOW).total_seconds() == 60
    assert (runs(5, draw=0.0)["dead.example.org:443"].retry_at - NOW).total_seconds() == 0


def test_a_host_is_left_alone_until_its_time_and_others_are_not() -> None:
    known = runs(3)
    assert health(known).refusal(URL, 0.0) is LEFT_ALONE
    assert health(known, NOW + timedelta(seconds=59)).refusal(SAME_HOST, 0.0) is LEFT_ALONE
    assert health(known, NOW + timedelta(seconds=60)).refusal(URL, 0.0) is None
    assert health(known).refusal(OTHER, 0.0) is None


def test_a_run_that_left_a_host_alone_changes_nothing_of_its_time() -> None:
    known = runs(4)
    hosts = health(known)
    assert hosts.refusal(URL, 0.0) is LEFT_ALONE
    assert hosts.after() == known


def test_a_run_that_a_person_asked_for_waits_for_nothing() -> None:
    assert health(runs(9), patient=False).refusal(URL, 0.0) is None


def test_a_retry_after_is_obeyed_from_the_first_run_on_up_to_an_hour() -> None:
    for asked, wait in ((120.0, 120), (86_400.0, 3600)):
        hosts = health()
        fail(hosts, 1, Failure(text="HTTP 503", permanent=False, retry_after=asked))
        known = hosts.after()
        assert health(known, NOW + timedelta(seconds=wait - 1)).refusal(URL, 0.0) is LEFT_ALONE
        assert health(known, NOW + timedelta(seconds=wait)).refusal(URL, 0.0) is None


def test_an_answer_ends_it() -> None:
    hosts = health(runs(5), NOW + timedelta(hours=1))
    hosts.record(URL, "blob", GOOD, 0.0)
    assert hosts.after() == {}


def test_a_time_of_a_clock_that_was_ahead_is_not_obeyed() -> None:
    known = {"dead.example.org:443": HostRecord(failures=9, retry_at=NOW + timedelta(days=400))}
    assert health(known).refusal(URL, 0.0) is None


def test_what_is_remembered_is_bounded() -> None:
    hosts = health({f"h{index}:443": HostRecord(failures=1, retry_at=NOW) for index in range(1000)})
    assert len(hosts.after()) == host_health.MOST_HOSTS
