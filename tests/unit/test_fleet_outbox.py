"""The queue of statuses, and what of an error may leave the node."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from reconciler.fleet import outbox
from reconciler.fleet.outbox import Outbox
from reconciler.fleet.public_text import LEFT_OUT, public_text

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.fixture
def box(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path)


def add(box: Outbox, content: str, now: datetime = NOW, draw: float = 0.0) -> bool:
    return box.add(content, lambda number: str(number).encode(), now, draw=lambda: draw)


def numbers(box: Outbox) -> list[int]:
    return [int(path.read_bytes()) for path in box.waiting()]


# -- the queue -------------------------------------------------------------------------------------------------


def test_what_did_not_change_is_not_said_again(box: Outbox) -> None:
    assert add(box, "a")
    assert not add(box, "a")
    assert add(box, "b")
    assert len(numbers(box)) == 2


def test_it_is_said_again_after_an_hour_or_up_to_a_quarter_earlier(box: Outbox) -> None:
    add(box, "a", draw=1.0)
    assert not add(box, "a", NOW + timedelta(minutes=44))
    assert add(box, "a", NOW + timedelta(minutes=45), draw=0.0)
    assert not add(box, "a", NOW + timedelta(minutes=45 + 59))
    assert add(box, "a", NOW + timedelta(minutes=45 + 60))


def test_numbers_grow_also_where_the_clock_is_set_back(box: Outbox) -> None:
    for hours in (0, 5, -5, -4, 1):
        add(box, str(hours), NOW + timedelta(hours=hours))
    found = numbers(box)
    assert found == sorted(set(found))
    assert len(found) == 5


def test_numbers_grow_also_where_the_store_was_lost(tmp_path: Path) -> None:
    first, second = Outbox(tmp_path), Outbox(tmp_path)
    add(first, "a")
    before = numbers(first)
    for path in tmp_path.iterdir():
        path.unlink()
    add(second, "a", NOW + timedelta(seconds=1))
    assert numbers(second) > before


def test_no_number_is_given_twice_where_the_write_of_the_status_fails(box: Outbox) -> None:
    made: list[int] = []

    def fails(number: int) -> bytes:
        made.append(number)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        box.add("a", fails, NOW)
    add(box, "a")
    add(box, "b")
    assert len(set(numbers(box))) == 2


def test_a_full_queue_loses_the_oldest(box: Outbox) -> None:
    for index in range(outbox.MOST + 10):
        add(box, str(index))
    found = numbers(box)
    assert len(found) == outbox.MOST
    assert found[-1] - found[0] == outbox.MOST - 1
    assert box.state().sequence == found[-1]


@pytest.mark.parametrize("data", [b"", b"{", b"null", b'{"sequence":"x"}', b"\xff"])
def test_a_damaged_record_is_as_a_new_one(box: Outbox, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "state.json").write_bytes(data)
    assert box.may_send(NOW)
    assert add(box, "a")


def waits(box: Outbox, draw: float = 1.0) -> Iterator[float]:
    while True:
        box.failed(NOW, draw=lambda: draw)
        until = box.state().retry_at
        assert until
        yield (until - NOW).total_seconds()


def test_the_wait_doubles_up_to_an_hour_and_outlives_the_process(box: Outbox, tmp_path: Path) -> None:
    assert list(itertools.islice(waits(box), 9)) == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    again = Outbox(tmp_path)
    assert not again.may_send(NOW + timedelta(minutes=59))
    assert again.may_send(NOW + timedelta(minutes=60))
    again.sent([])
    assert again.may_send(NOW)
    assert next(waits(again)) == 30


def test_the_wait_is_drawn_from_the_whole_span(box: Outbox) -> None:
    assert next(waits(box, draw=0.0)) == 0
    assert next(waits(box, draw=0.5)) == 30


def test_what_the_receiver_asks_for_is_obeyed_up_to_an_hour(box: Outbox) -> None:
    for asked, waited in ((90.0, 90), (86_400.0, 3600)):
        box.failed(NOW, asked_seconds=asked, draw=lambda: 0.0)
        assert not box.may_send(NOW + timedelta(seconds=waited - 1))
        assert box.may_send(NOW + timedelta(seconds=waited))


def test_a_clock_that_was_ahead_silences_nothing(box: Outbox) -> None:
    add(box, "a", NOW + timedelta(days=400))
    box.failed(NOW + timedelta(days=400))
    assert box.may_send(NOW)
    assert add(box, "a")


# -- what may leave the node -----------------------------------------------------------------------------------

PUBLIC = ("a:v1", "weights/model.gguf", "hub.example.org")


@pytest.mark.parametrize(
    "text",
    [
        "smoke-failed: it generated 0 tokens, expected at least 1",
        "incompatible: needs 40.0 GiB of GPU memory, and the largest GPU has 24.0 GiB",
        "incompatible: llama-cpp 0.2.9 is installed, and it needs >0.3,<0.5",
        "hash-mismatch: the bytes are sha256:" + "ab" * 32,
        "the model a:v1 has no file 'weights/model.gguf'",
        "HTTP 404: it does not have the file; 12.5% of 3 tries",
    ],
)
def test_a_sentence_without_anything_of_the_node_stays(text: str) -> None:
    assert public_text(text, public=PUBLIC).replace(f">{LEFT_OUT}", "") == text


@pytest.mark.parametrize(
    "secret",
    [
        "/home/ann/store/blobs/x", "'/etc/passwd'", "~/.netrc", "C:\\Users\\ann", "ann@laptop", "https://user:pass@hub.example.org/x",
        "https://mirror.corp.internal/sha256/00", "HF_TOKEN=hf_abcdef", "hf_AbCdEfGhIjKlMnOpQrSt123456", "10.1.2.3", "10.1.2.3:8080",
        "fe80::1", "db7.corp.internal", "gpu-node-17", "GPU-NODE-17.lan", "(ann)", "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.e30.x",
        "f3b1c2d4e5a697887766554433221100", "token%3Dabc", "x" * 60,
    ],
)  # fmt: skip
def test_whatever_could_be_the_nodes_own_is_left_out(secret: str) -> None:
    said = public_text(f"the engine said {secret} and ended", public=PUBLIC, private=("gpu-node-17", "ann"))
    assert said.startswith("the engine said ")
    assert said.endswith(" and ended")
    assert LEFT_OUT in said
    for part in (secret.strip("'()"), "pass", "internal", "ann"):
        assert part not in said.replace("hub.example.org", "") or part == "ann"
    assert "ann" not in said


def test_the_host_of_a_signed_source_stays_and_its_query_goes() -> None:
    said = public_text("https://hub.example.org/a/b?token=secret: HTTP 500", public=PUBLIC)
    assert said == f"https://hub.example.org/{LEFT_OUT} HTTP 500"


def test_a_text_is_one_short_line() -> None:
    said = public_text("a\x1b[31m b\n" * 1000)
    assert len(said) <= 310
    assert said.isprintable()
