"""The order in which sources are tried, and who is blamed for what."""

from __future__ import annotations

from reconciler.core.errors import FetchError, HashMismatch, SizeMismatch
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.source_selection import Ask, Course, Stop, Wait
from reconciler.fetch.sources import Failure

A, B, C = "https://a.example/x", "https://b.example/x", "https://c.example/x"
SETTINGS = FetchSettings(attempts=3, backoff_seconds=1.0, backoff_cap_seconds=8.0)
DIGEST = "sha256:" + "0" * 64
BROKE = Failure(text="the connection failed", permanent=False)
GONE = Failure(text="HTTP 404")
LIED = Failure(text="its bytes hash to something else", kind="hash-mismatch")


def course(*urls: str, together: bool = True) -> Course:
    return Course(DIGEST, urls, SETTINGS, together=together)


def test_all_are_asked_together_or_the_first_alone() -> None:
    assert course(A, B, C).next(0) == Ask((A, B, C))
    assert course(A, B, C, together=False).next(0) == Ask((A,))


def test_a_source_that_failed_for_good_is_not_asked_again() -> None:
    it = course(A, B)
    assert [blame.url for blame in it.failed((A,), GONE, 0)] == [A]
    assert it.next(0) == Ask((B,))


def test_failures_are_tried_again_with_a_growing_pause_and_not_for_ever() -> None:
    it = course(A)
    it.failed((A,), BROKE, 0)
    assert it.next(0) == Wait(1.0)
    it.failed((A,), BROKE, 1)
    assert it.next(1) == Wait(3.0)
    it.failed((A,), BROKE, 3)
    assert isinstance(it.next(99), Stop)


def test_gained_bytes_start_the_count_anew() -> None:
    it = course(A)
    for now in range(50):
        it.failed((A,), BROKE, now * 10, gained=True)
        assert it.next(now * 10 + 1) == Ask((A,))


def test_the_same_failure_is_told_once() -> None:
    it = course(A)
    assert it.failed((A,), BROKE, 0)
    assert it.failed((A,), BROKE, 5) == []


def test_retry_after_is_kept_to_and_a_long_one_ends_it() -> None:
    it = course(A, B)
    it.failed((A,), Failure(text="HTTP 429", permanent=False, retry_after=7), 0)
    it.failed((B,), Failure(text="HTTP 429", permanent=False, retry_after=3600), 0)
    assert it.next(6.9) == Wait(7.0)
    assert it.next(7) == Ask((A,))


def test_a_liar_is_named_and_never_asked_again() -> None:
    it = course(A, B)
    assert [(blame.url, blame.failure.kind) for blame in it.lied((A,), LIED, resumed=False)] == [(A, "hash-mismatch")]
    assert it.next(0) == Ask((B,))


def test_mixed_mirrors_are_tried_alone_until_the_liar_is_known() -> None:
    it = course(A, B)
    assert [blame.url for blame in it.lied((A, B), LIED, resumed=False)] == [""]
    assert it.next(0) == Ask((A,))
    assert [blame.url for blame in it.proved((A,))] == [B]


def test_of_three_the_liar_is_found_when_it_is_tried() -> None:
    it = course(A, B, C)
    it.lied((A, B, C), LIED, resumed=False)
    assert [blame.url for blame in it.lied((A,), LIED, resumed=False)] == [A]
    assert it.next(0) == Ask((B,))
    assert [blame.url for blame in it.proved((B,))] == [C]


def test_nobody_is_blamed_for_what_an_earlier_run_left() -> None:
    it = course(A)
    assert [blame.url for blame in it.lied((A,), LIED, resumed=True)] == [""]
    assert it.next(0) == Ask((A,))


def test_nobody_is_blamed_for_a_shared_transfer_that_broke() -> None:
    it = course(A, B)
    assert [blame.url for blame in it.broke((A, B), GONE, 0, gained=False)] == [""]
    assert it.next(0) == Ask((A,))
    it.broke((A,), GONE, 0, gained=False)
    assert it.next(0) == Ask((B,))


def test_a_slow_source_is_left_for_the_next_and_kept_if_there_is_none() -> None:
    it = course(A, B, together=False)
    it.slow((A,), 0)
    assert it.next(0) == Ask((B,))
    it.failed((B,), GONE, 0)
    assert it.next(5) == Ask((A,))


def test_a_slow_source_without_another_is_not_tried_for_ever() -> None:
    it = course(A)
    for now in (0, 100, 200):
        it.slow((A,), now)
    assert isinstance(it.next(300), Stop)


def test_the_error_says_what_each_source_did_without_secrets() -> None:
    it = course(A + "?token=hush", B)
    it.failed((A + "?token=hush",), GONE, 0)
    it.failed((B,), GONE, 0)
    stop = it.next(0)
    assert isinstance(stop, Stop)
    assert "a.example" in stop.error.message
    assert "b.example" in stop.error.message
    assert "hush" not in stop.error.message


def test_the_error_is_named_for_the_worst() -> None:
    for failure, kind in ((GONE, FetchError), (LIED, HashMismatch), (Failure(text="long", kind="size-mismatch"), SizeMismatch)):
        it = course(A, B)
        it.lied((A,), failure, resumed=False)
        it.failed((B,), GONE, 0)
        stop = it.next(0)
        assert isinstance(stop, Stop)
        assert type(stop.error) is kind
    empty = course().next(0)
    assert isinstance(empty, Stop)
    assert "no source is named" in empty.error.message
