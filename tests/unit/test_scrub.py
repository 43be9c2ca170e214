"""How many stored files an agent hashes again in a cycle, by their ages."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.agent import cycle


def test_a_fresh_store_is_not_hashed_again_at_once() -> None:
    assert cycle.due([], 100.0) == 0
    assert cycle.due([0.0] * 50, 100.0) == 0


def test_blobs_that_came_together_are_hashed_one_after_the_other() -> None:
    ages, hashed = [0.0] * 10, []
    for _ in range(100):
        ages = [age + 1.0 for age in ages]
        count = cycle.due(ages, 100.0)
        ages = sorted(ages)[: len(ages) - count] + [0.0] * count
        hashed.append(count)

    assert max(hashed) == 1
    assert sum(hashed) == 10


def test_a_single_blob_is_hashed_when_it_comes_of_age() -> None:
    assert [cycle.due([age], 100.0) for age in (0.0, 1.0, 99.0, 100.0)] == [0, 0, 0, 1]


def test_what_was_never_hashed_is_due_at_once() -> None:
    assert cycle.due([float("inf"), 1.0, 2.0], 100.0) == 1
    assert cycle.due([1.0, 2.0], 0.0) == 2


@settings(max_examples=60, deadline=None)
@given(
    ages=st.lists(st.floats(0, 1000), min_size=1, max_size=40),
    steps=st.lists(st.floats(0.1, 50.0), min_size=5, max_size=60),
    within=st.floats(60.0, 2000.0),
)
def test_no_blob_stays_unchecked_longer_than_asked(ages: list[float], steps: list[float], within: float) -> None:
    for step in steps:
        count = cycle.due(ages, within)
        ages = sorted(ages)[: len(ages) - count] + [0.0] * count
        assert max(ages) < within * (1 + 1e-9)  # sums of floats are not exact
        ages = [age + step for age in ages]
        assert max(ages) < (within + step) * (1 + 1e-9)
