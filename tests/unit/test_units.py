"""Sizes and times as people write them; nothing is guessed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core import units


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("1", 1), ("512", 512), ("1B", 1), ("1K", 1024), ("1KiB", 1024), ("1KB", 1000), ("1.5KiB", 1536), ("10GiB", 10 << 30),
        ("2 MB", 2_000_000), ("1TiB", 1 << 40), ("1PB", 10**15), (" 7MiB ", 7 << 20),
    ],
)  # fmt: skip
def test_a_size_is_what_it_says(text: str, count: int) -> None:
    assert units.size(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1gib", "1 gigs", "1e9", "0x10", "1,5GiB", "1..5", "nan", "inf", "\u0661KiB", "1KiB\n1", "1" * 40, "1GiBs"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        units.size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("100ms", 0.1), ("90s", 90), ("5m", 300), ("1.5h", 5400), ("24h", 86400), ("7d", 604800), ("2w", 1209600)],
)
def test_a_duration_is_what_it_says(text: str, seconds: float) -> None:
    assert units.seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-5m", "5 minutes", "5M", "1y", "1h30m", "nan", "\u0665m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        units.seconds(text)


def test_numbers_are_bytes_and_seconds() -> None:
    assert (units.size(7), units.seconds(7), units.seconds(0.5)) == (7, 7.0, 0.5)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 50, "3072.0 TiB")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert units.human_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (0.34, "0.3s"), (10, "10s"), (59.6, "60s"), (61, "1m 1s"), (3600, "1h 0m"), (4320, "1h 12m"), (90000, "1d 1h")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert units.human_time(seconds) == text


@given(st.integers(0, 10**15 - 1))
def test_a_size_written_in_bytes_is_read_back(count: int) -> None:
    assert units.size(f"{count}B") == count


@pytest.mark.parametrize(
    ("instant", "text"),
    [
        (datetime(2026, 11, 20, tzinfo=UTC), "2026-11-20T00:00:00Z"),
        (datetime(2026, 11, 20, 2, tzinfo=timezone(timedelta(hours=2))), "2026-11-20T00:00:00Z"),
        (datetime(2026, 11, 20, 0, 0, 0, 999_999, tzinfo=UTC), "2026-11-20T00:00:00Z"),
        (datetime(99, 1, 1, tzinfo=UTC), "0099-01-01T00:00:00Z"),
    ],
)
def test_instants_are_utc_in_whole_seconds(instant: datetime, text: str) -> None:
    assert units.rfc3339(instant) == text


def test_one_is_no_plural() -> None:
    assert [units.count(number, "model") for number in (0, 1, 2)] == ["0 models", "1 model", "2 models"]
