"""How far a transfer has come: what is shown of it, and what its failures are judged by."""

from __future__ import annotations

from reconciler.fetch.progress import Progress


def resumed() -> Progress:
    """A file of 1,000 bytes of which an earlier run left 400."""
    progress = Progress(1000)
    progress.restart(400)
    return progress


def test_what_an_earlier_run_left_is_shown_before_the_downloader_has_opened_the_file() -> None:
    progress = resumed()

    progress.update(0, 0)

    assert progress.done == 400


def test_what_the_downloader_says_counts_once_it_says_something() -> None:
    progress = resumed()

    progress.update(700, 50)

    assert (progress.done, progress.speed) == (700, 50)


def test_an_attempt_that_fails_before_the_file_was_opened_brought_nothing() -> None:
    progress = resumed()

    progress.update(0, 0)

    assert progress.is_stuck()
    assert not progress.is_further()


def test_an_attempt_that_came_clearly_further_says_so_once() -> None:
    progress = resumed()

    progress.update(700, 0)

    assert progress.is_further()
    assert not progress.is_further()


def test_a_few_bytes_more_are_no_gain() -> None:
    progress = resumed()
    progress.update(700, 0)
    assert progress.is_further()

    progress.restart(700)
    progress.update(710, 0)

    assert not progress.is_further()
