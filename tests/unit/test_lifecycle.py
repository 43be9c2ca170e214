"""The table of a model's life, cell by cell, as the contract's chapter on states says it."""

from __future__ import annotations

from typing import get_args

import pytest

from reconciler.core import lifecycle
from reconciler.core.lifecycle import DESIRED, OBSERVED, OPS, REASONS, TABLE, Desired, Observed, Op, decide


def test_the_table_is_total() -> None:
    assert {(row, column) for row in OBSERVED for column in DESIRED} == {(row, column) for row in TABLE for column in DESIRED}
    assert all(len(cells) == len(DESIRED) for cells in TABLE.values())
    assert get_args(Observed) == OBSERVED
    assert get_args(Desired) == DESIRED
    assert get_args(Op) == OPS
    assert {decide(row, column) for row in OBSERVED for column in DESIRED} <= set(OPS)


#: What each rule of the contract says, as the cells that it decides.
RULES: dict[str, dict[tuple[Observed, Desired], Op]] = {
    "an enabled model that is not here is installed": {("absent", "enabled"): "install"},
    "what is here and was never tested is tested, not fetched": {("pending", "enabled"): "retest"},
    "what is as it should be is left alone": {
        ("active", "enabled"): "keep", ("inactive", "disabled"): "keep", ("archived", "archived"): "keep",
        ("absent", "disabled"): "keep", ("absent", "archived"): "keep", ("absent", "unlisted"): "keep",
    },
    "other content under an id is installed": {("outdated", "enabled"): "install"},
    "a test that is no longer good is made again": {("due", "enabled"): "retest"},
    "a damaged copy is repaired": {("damaged", "enabled"): "repair", ("damaged", "disabled"): "repair"},
    "an installed model needs its link alone": {("inactive", "enabled"): "enable"},
    "a failed one is reinstalled on the next sync": {("failed", "enabled"): "install"},
    "a failed one that nobody asks for rests": {("failed", "disabled"): "keep"},
    "cold storage gives it back without a download": {("archived", "enabled"): "restore", ("archived", "disabled"): "restore"},
    "disabled: kept installed, not active": {
        (row, "disabled"): "disable" for row in ("pending", "active", "outdated", "due")
    },
    "archived: moved to cold storage": {
        (row, "archived"): "archive" for row in ("pending", "active", "outdated", "due", "inactive")
    },
    "bad bytes are not kept in cold storage": {("damaged", "archived"): "remove", ("failed", "archived"): "remove"},
    "a model that is not listed is removed": {
        (row, "unlisted"): "remove" for row in OBSERVED if row != "absent"
    },
    "nothing is downloaded for a model that this node cannot run": {
        (row, "incompatible"): "reject" for row in OBSERVED if row not in {"active", "due"}
    },
    "a retired model serves on, and is never installed anew": {
        **{(row, column): "keep" for row in ("absent", "active", "outdated", "archived") for column in ("retired", "standby")},
        ("inactive", "retired"): "enable",
    },
    "a retired model whose replacement ended serves again": {("inactive", "standby"): "enable"},
    "a retired model is tested and repaired while it must serve": {
        **{(row, column): "retest" for row in ("pending", "due") for column in ("retired", "standby")}, ("damaged", "retired"): "repair",
    },
    "a retired model that failed, or is damaged and does not serve, goes": {
        ("damaged", "standby"): "remove", ("failed", "retired"): "remove", ("failed", "standby"): "remove",
    },
    "what serves goes on serving: only the network takes it away": {("active", "incompatible"): "keep", ("due", "incompatible"): "keep"},
    "of a model that may not be understood nothing serves, and no work is done": {(row, "unreadable"): "reject" for row in OBSERVED},
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_every_cell_is_what_the_contract_says(rule: str) -> None:
    assert {cell: decide(*cell) for cell in RULES[rule]} == RULES[rule]


def test_every_cell_has_its_rule_and_no_cell_has_two() -> None:
    cells = [cell for rule in RULES.values() for cell in rule]

    assert sorted(cells) == sorted((row, column) for row in OBSERVED for column in DESIRED)


def test_nothing_is_ever_activated_that_the_snapshot_does_not_permit_to_serve() -> None:
    for row in OBSERVED:
        for column in DESIRED:
            if column not in {"enabled", "disabled", "retired", "standby"}:
                assert decide(row, column) not in {"install", "repair", "retest", "enable", "restore"}


def test_nothing_is_ever_fetched_for_a_retired_model_but_to_repair_what_serves() -> None:
    fetching = {
        (row, column) for row in OBSERVED for column in ("retired", "standby") if decide(row, column) in {"install", "repair", "restore"}
    }

    assert fetching == {("damaged", "retired")}


@pytest.mark.parametrize("word", REASONS)
def test_a_reason_starts_with_its_word(word: str) -> None:
    assert lifecycle.reason(word) == f"{word}: {REASONS[word]}"
    assert lifecycle.reason(word, "more") == f"{word}: more"
    assert word == word.lower()
    assert " " not in word


def test_a_word_that_is_not_listed_is_refused() -> None:
    with pytest.raises(KeyError):
        lifecycle.reason("somehow")
