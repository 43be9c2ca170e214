"""What ``verify`` found is in the ledger: what is good together, damage at once, and what was hashed before an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from reconciler.commands import verify
from reconciler.core.events import Event, Incident
from reconciler.store.ledger import COLD_VERIFIED, Ledger, Verification
from tests.node import Node, flip
from tests.twins.content import name_of

MANY = 200


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The digests of each record that is written to the ledger, in order."""
    written: list[list[str]] = []
    record, set_fact = Ledger.record_verified, Ledger.set_fact

    def recorded(self: Ledger, found: Mapping[str, Verification]) -> None:
        written.append([*found])
        record(self, found)

    def fact_set(self: Ledger, key: str, value: object) -> None:
        if key == COLD_VERIFIED:
            assert isinstance(value, dict)
            written.append([*value])
        set_fact(self, key, value)

    monkeypatch.setattr(Ledger, "record_verified", recorded)
    monkeypatch.setattr(Ledger, "set_fact", fact_set)
    return written


def placed(node: Node, folder: Path) -> list[str]:
    """Put many small blobs into *folder*, and return their digests."""
    names = [name_of(b"%d" % number) for number in range(MANY)]
    for number, name in enumerate(names):
        algorithm, digits = name.split(":")
        path = folder / algorithm / digits[:2] / digits
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
        path.chmod(0o444)
    return names


def ignore(_: Event) -> None:
    """Report nothing."""


def test_good_files_are_recorded_together(used: Node, writes: list[list[str]]) -> None:
    names = placed(used, used.store / "blobs")
    writes.clear()

    found = verify.verify(used.context(), ignore)

    assert found.damage == ()
    assert {name for record in writes for name in record} >= {*names}
    assert len(writes) < MANY / 10, "each record is synced"
    assert max(map(len, writes)) > 1
    assert max(verify.ages(used.context())) < 3600


def test_good_copies_in_cold_storage_are_recorded_together(used: Node, writes: list[list[str]]) -> None:
    names = placed(used, used.store / "archive" / "blobs")
    writes.clear()

    found = verify.verify(used.context(), ignore)

    assert found.damage == ()
    assert {*writes[-1]} == {*names}
    assert len(writes) < MANY / 10, "each record holds the times of all copies"


def test_what_was_hashed_before_an_interruption_is_recorded(used: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    names = placed(used, used.store / "blobs")
    finished: list[str] = []

    def interrupted(_: object, name: str, _size: int) -> None:
        if len(finished) == 20:
            raise KeyboardInterrupt
        finished.append(name)

    monkeypatch.setattr(verify._Progress, "finished", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify.verify(used.context(), ignore)

    with Ledger.reading(used.store / "ledger.db") as ledger:
        assert {*finished} & {*names} <= ledger.verifications().keys()


def test_damage_is_recorded_before_it_is_told(used: Node) -> None:
    names = placed(used, used.store / "blobs")
    algorithm, digits = names[7].split(":")
    flip(used.store / "blobs" / algorithm / digits[:2] / digits)
    seen: list[int] = []

    def report(event: Event) -> None:
        if isinstance(event, Incident):
            with Ledger.reading(used.store / "ledger.db") as ledger:
                seen.append(ledger.verifications()[names[7]].size)

    found = verify.verify(used.context(), report)

    assert [one.name for one in found.damage] == [names[7]]
    assert seen == [-1]
