"""What a store has accepted is remembered twice, and its loss fails closed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.core.errors import TrustStateLost
from reconciler.core.trust import TrustState
from reconciler.store import trust_state
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger
from tests.crash.scenario import KILLED, Effects, child, killed_at
from tests.twins.content import name_of

OLD = TrustState(version=3, digest=name_of(b"3"), issued_at=datetime(2026, 11, 20, tzinfo=UTC), role="a", root_version=1)
NEW = TrustState(version=4, digest=name_of(b"4"), issued_at=datetime(2026, 11, 21, tzinfo=UTC), role="a", root_version=1)
#: (the older, the newer): what rises from one acceptance to the next.
STEPS = (
    (OLD, NEW),
    (NEW, replace(NEW, version=5)),  # issued in one second
    (NEW, replace(NEW, version=1, issued_at=datetime(2026, 11, 22, tzinfo=UTC), role="b", root_version=2)),  # others sign, and count anew
    (NEW, replace(NEW, role="b", root_version=2)),  # others sign the very same
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path, tmp_path / "cold")


@pytest.fixture
def ledger(layout: Layout) -> Iterator[Ledger]:
    with Ledger.writing(layout.ledger) as writing:
        yield writing


def test_a_new_store_has_the_lowest(layout: Layout, ledger: Ledger) -> None:
    assert trust_state.read(layout, ledger) == TrustState()


def test_it_is_remembered_twice(layout: Layout, ledger: Ledger) -> None:
    trust_state.write(layout, ledger, NEW)

    assert trust_state.in_file(layout) == ledger.trust_state() == trust_state.read(layout, ledger) == NEW


@pytest.mark.parametrize("behind", ["file", "ledger"])
@pytest.mark.parametrize(("old", "new"), STEPS)
def test_an_old_copy_that_is_brought_back_gains_nothing(
    layout: Layout, ledger: Ledger, behind: str, old: TrustState, new: TrustState
) -> None:
    trust_state.write(layout, ledger, old if behind == "file" else new)
    ledger.set_fact("floor", new if behind == "file" else old)

    assert trust_state.read(layout, ledger) == new


def test_a_record_with_the_time_of_a_clock_that_was_wrong_is_read_without_it(layout: Layout, ledger: Ledger) -> None:
    trust_state.write(layout, ledger, NEW)
    path = layout.trust / "floor.json"
    path.write_bytes(path.read_bytes()[:-1] + b',"seen_at":"2027-06-08T00:00:00Z"}')

    assert trust_state.in_file(layout) == trust_state.read(layout, ledger) == NEW


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"garbage", b'{"version":4', b'{"version":"4"}', b'{"version":0}'])
def test_a_damaged_file_is_read_from_the_ledger_and_never_as_a_first_run(layout: Layout, ledger: Ledger, data: bytes) -> None:
    trust_state.write(layout, ledger, NEW)
    (layout.trust / "floor.json").write_bytes(data)
    assert trust_state.read(layout, ledger) == NEW

    trust_state.keep_envelope(layout, b"envelope")
    ledger.set_fact("floor", None)

    with pytest.raises(TrustStateLost):
        trust_state.read(layout, ledger)


def test_a_crash_while_it_is_raised_leaves_the_old_or_the_new(layout: Layout) -> None:
    def work(number: int) -> None:
        with Ledger.writing(layout.ledger) as ledger, Effects(killed_at(number), root=layout.root):
            trust_state.write(layout, ledger, NEW)

    for number in range(1, 99):
        with Ledger.writing(layout.ledger) as ledger:
            trust_state.write(layout, ledger, OLD)
        code = child(lambda number=number: work(number))  # type: ignore[misc]  # each its own number
        with Ledger.reading(layout.ledger) as ledger:
            assert trust_state.read(layout, ledger) in ((NEW,) if code == 0 else (OLD, NEW))
        if code == 0:
            break
        assert code == KILLED

    assert number > 4


def test_envelopes_and_roots_are_kept_by_what_they_are(layout: Layout) -> None:
    trust_state.keep_envelope(layout, b"envelope")
    trust_state.keep_envelope(layout, b"envelope")
    for version in (10, 2, 9):
        trust_state.keep_root(layout, version, str(version).encode())
    (layout.trust / "roots/strange.json").write_bytes(b"x")

    assert [(path.name, path.read_bytes()) for path in kept(layout)] == [(f"{name_of(b'envelope').replace(':', '-')}.json", b"envelope")]
    assert trust_state.roots(layout) == (b"2", b"9", b"10")


def test_envelopes_are_bounded_and_the_oldest_go_but_never_the_last_one(layout: Layout) -> None:
    later = time.time() + 9999
    for number in range(trust_state.ENVELOPES + 3):  # as if the clock had been ahead until now
        trust_state.keep_envelope(layout, str(number).encode())
        os.utime(next(path for path in kept(layout) if path.read_bytes() == str(number).encode()), times=(later, later + number))

    assert {int(path.read_bytes()) for path in kept(layout)} == set(range(3, trust_state.ENVELOPES + 3))
    trust_state.keep_envelope(layout, b"9999")
    assert {int(path.read_bytes()) for path in kept(layout)} == {*range(4, trust_state.ENVELOPES + 3), 9999}


def kept(layout: Layout) -> list[Path]:
    """Return where the envelopes lie that are kept."""
    return sorted((layout.trust / "snapshots").iterdir())
