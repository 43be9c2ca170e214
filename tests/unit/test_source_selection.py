"""The order in which sources are tried, and who is blamed for what."""

from __future__ import annotations

from reconciler.core.errors import FetchError, HashMismatch, SizeMismatch
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.source_selection import GiveUp, RetryLater, SourceSelector, TrySources
from reconciler.fetch.sources import Failure

A, B, C = "https://a.example/x", "https://b.example/x", "https://c.example/x"
SETTINGS = FetchSettings(attempts=3, backoff_seconds=1.0, backoff_cap_seconds=8.0)
DIGEST = "sha256:" + "0" * 64
BROKE = Failure(text="the connection failed", permanent=False)
GONE = Failure(text="HTTP 404", final=True)
LIED = Failure(text="its bytes hash to something else", kind="hash-mismatch")


def selector(*urls: str, together: bool = True) -> SourceSelector:
    return SourceSelector(DIGEST, urls, SETTINGS, together=together)


def test_all_are_asked_together_or_the_first_alone() -> None:
    assert selector(A, B, C).next(0) == TrySources((A, B, C))
    assert selector(A, B, C, together=False).next(0) == TrySources((A,))


def test_a_source_that_failed_for_good_is_not_asked_again() -> None:
    it = selector(A, B)
    assert [blame.url for blame in it.record_failure((A,), GONE, 0)] == [A]
    assert it.next(0) == TrySources((B,))


def test_failures_are_tried_again_with_a_growing_pause_and_not_for_ever() -> None:
    it = selector(A)
    it.record_failure((A,), BROKE, 0)
    assert it.next(0) == RetryLater(1.0)
    it.record_failure((A,), BROKE, 1)
    assert it.next(1) == RetryLater(3.0)
    it.record_failure((A,), BROKE, 3)
    assert it.next(99) == TrySources((A,)), "the last try, in one plain request"
    it.record_failure((A,), BROKE, 99)
    assert isinstance(it.next(999), GiveUp)


def test_gained_bytes_start_the_count_anew() -> None:
    it = selector(A)
    for now in range(50):
        it.record_failure((A,), BROKE, now * 10, gained=True)
        assert it.next(now * 10 + 1) == TrySources((A,))


def test_the_same_failure_is_told_once() -> None:
    it = selector(A)
    assert it.record_failure((A,), BROKE, 0)
    assert it.record_failure((A,), BROKE, 5) == []


def test_retry_after_is_kept_to_and_a_long_one_ends_it() -> None:
    it = selector(A, B)
    it.record_failure((A,), Failure(text="HTTP 429", permanent=False, retry_after=7), 0)
    it.record_failure((B,), Failure(text="HTTP 429", permanent=False, retry_after=3600), 0)
    assert it.next(6.9) == RetryLater(7.0)
    assert it.next(7) == TrySources((A,))


def test_a_liar_is_named_and_never_asked_again() -> None:
    it = selector(A, B)
    assert [(blame.url, blame.failure.kind) for blame in it.record_wrong_bytes((A,), LIED, resumed=False)] == [(A, "hash-mismatch")]
    assert it.next(0) == TrySources((B,))


def test_mixed_mirrors_are_tried_alone_until_the_liar_is_known() -> None:
    it = selector(A, B)
    assert [blame.url for blame in it.record_wrong_bytes((A, B), LIED, resumed=False)] == [""]
    assert it.next(0) == TrySources((A,))
    assert [blame.url for blame in it.record_verified((A,))] == [B]


def test_of_three_the_liar_is_found_when_it_is_tried() -> None:
    it = selector(A, B, C)
    it.record_wrong_bytes((A, B, C), LIED, resumed=False)
    assert [blame.url for blame in it.record_wrong_bytes((A,), LIED, resumed=False)] == [A]
    assert it.next(0) == TrySources((B,))
    assert [blame.url for blame in it.record_verified((B,))] == [C]


def test_nobody_is_blamed_for_what_an_earlier_run_left() -> None:
    it = selector(A)
    assert [blame.url for blame in it.record_wrong_bytes((A,), LIED, resumed=True)] == [""]
    assert it.next(0) == TrySources((A,))


def test_nobody_is_blamed_for_a_shared_transfer_that_broke() -> None:
    it = selector(A, B)
    assert [blame.url for blame in it.record_interrupted((A, B), GONE, 0, gained=False)] == [""]
    assert it.next(0) == TrySources((A,))
    it.record_interrupted((A,), GONE, 0, gained=False)
    assert it.next(0) == TrySources((B,))


def test_a_slow_source_is_left_for_the_next_and_kept_if_there_is_none() -> None:
    it = selector(A, B, together=False)
    it.record_slow((A,), 0)
    assert it.next(0) == TrySources((B,))
    it.record_failure((B,), GONE, 0)
    assert it.next(5) == TrySources((A,))


def test_a_slow_source_without_another_is_not_tried_for_ever() -> None:
    it = selector(A)
    for now in (0, 100, 200, 300):
        it.record_slow((A,), now)
    assert isinstance(it.next(400), GiveUp)


REFUSED = Failure(text="HTTP 416")


def test_a_source_is_exhausted_only_after_one_plain_request() -> None:
    it = selector(A)
    it.record_failure((A,), REFUSED, 0)
    assert (it.next(0), it.mode(A)) == (TrySources((A,)), "plain")
    it.record_failure((A,), REFUSED, 0)
    assert isinstance(it.next(0), GiveUp)


def test_a_wrong_length_ends_a_source_after_one_plain_request_and_wrong_bytes_at_once() -> None:
    for failure, tries in ((Failure(text="long", kind="size-mismatch"), ["parallel", "plain"]), (LIED, ["parallel"])):
        it, modes = selector(A), []
        while isinstance(it.next(0), TrySources):
            modes.append(it.mode(A))
            it.record_wrong_bytes((A,), failure, resumed=False)
        assert modes == tries


def test_what_says_nothing_about_ranges_is_final() -> None:
    it = selector(A)
    it.record_failure((A,), GONE, 0)
    assert isinstance(it.next(0), GiveUp)


def test_a_transfer_that_gained_nothing_is_tried_over_one_connection_and_then_plainly() -> None:
    it = selector(A)
    modes = [it.mode(A)]
    for now in (0, 10, 20):
        it.record_interrupted((A,), BROKE, now, gained=False)
        assert it.next(now + 9) == TrySources((A,))
        modes.append(it.mode(A))
    assert modes == ["parallel", "single", "single", "plain"]
    it.record_interrupted((A,), BROKE, 30, gained=False)
    assert isinstance(it.next(99), GiveUp)


def test_a_transfer_that_gained_keeps_its_connections() -> None:
    it = selector(A)
    it.record_interrupted((A,), BROKE, 0, gained=True)
    assert it.mode(A) == "parallel"


def test_bytes_are_not_given_up_for_a_source_that_stopped_answering() -> None:
    it = selector(A)
    for now in (0, 10, 20):
        it.record_failure((A,), BROKE, now, may_restart=False)
    assert it.mode(A) == "parallel"
    assert isinstance(it.next(99), GiveUp)


def test_sources_whose_ranges_work_come_first() -> None:
    it = selector(A, B, C)
    it.record_failure((A,), REFUSED, 0)
    assert it.next(0) == TrySources((B, C))
    it.record_failure((B,), GONE, 0)
    it.record_failure((C,), GONE, 0)
    assert (it.next(0), it.mode(A)) == (TrySources((A,)), "plain")


def test_a_source_that_wants_to_be_left_alone_is_not_asked_plainly_either() -> None:
    it = selector(A)
    it.record_failure((A,), Failure(text="HTTP 429", permanent=False, retry_after=3600), 0)
    assert isinstance(it.next(0), GiveUp)


def test_the_error_says_what_each_source_did_without_secrets() -> None:
    it = selector(A + "?token=hush", B)
    it.record_failure((A + "?token=hush",), GONE, 0)
    it.record_failure((B,), GONE, 0)
    stop = it.next(0)
    assert isinstance(stop, GiveUp)
    assert "a.example" in stop.error.message
    assert "b.example" in stop.error.message
    assert "hush" not in stop.error.message


def test_the_error_is_named_for_the_worst() -> None:
    for failure, kind in ((GONE, FetchError), (LIED, HashMismatch), (Failure(text="long", kind="size-mismatch"), SizeMismatch)):
        it = selector(A, B)
        it.record_failure((B,), GONE, 0)
        while isinstance(it.next(0), TrySources):
            it.record_wrong_bytes((A,), failure, resumed=False)
        stop = it.next(0)
        assert isinstance(stop, GiveUp)
        assert type(stop.error) is kind
    empty = selector().next(0)
    assert isinstance(empty, GiveUp)
    assert "no source is named" in empty.error.message
