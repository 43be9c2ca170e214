"""The recorded ratios beside their baseline. Nothing is measured here: a timed test fails when the machine is busy."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks import table
from benchmarks.table import Row, Table


def _table(**ratios: float) -> Table:
    return Table(
        machine="m",
        date="2026-01-01",
        load=0.0,
        rows=tuple(Row(what=what, peer="p", seconds=ratio, peer_seconds=1.0) for what, ratio in ratios.items()),
    )


def test_no_recorded_ratio_is_more_than_15_percent_above_its_baseline() -> None:
    assert not table.regressions(table.read(table.RECORDED), table.read(table.BASELINE))


def test_the_table_in_the_results_is_the_recorded_one() -> None:
    assert table.render(table.read(table.RECORDED)) in table.RESULTS.read_text()


@pytest.mark.parametrize(("now", "seen"), [(1.0, False), (1.14, False), (1.16, True), (0.5, False)])
def test_a_ratio_that_grew_by_more_than_15_percent_is_named(now: float, seen: bool) -> None:
    found = table.regressions(_table(plan=now, status=1.0), _table(plan=1.0, status=1.0))

    assert ["plan" in one for one in found] == [True] * seen


def test_a_ratio_that_is_not_recorded_any_more_is_named() -> None:
    assert len(table.regressions(_table(plan=1.0), _table(plan=1.0, status=1.0))) == 1


def test_a_recorded_table_comes_back_as_it_was() -> None:
    made = _table(plan=1.5)

    assert msgspec.json.decode(msgspec.json.encode(made), type=Table) == made
