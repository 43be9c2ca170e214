"""
Pull the plug at every step: the promise of the store, made a measured fact.

A child process runs the scenario with the real store and dies, as by ``kill -9``, right before its n-th effect; ``make crash`` does so for
every n, this for one in three. What holds after each: everything active is approved, tested and whole, a blob's bytes are its name's, one
version of each model serves, the floor stands; and the next run ends where an untouched one ends.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.scenario import (
    KILLED,
    UNTOUCHED,
    Scene,
    differences,
    effects_of_a_run,
    interrupted_again,
    interrupted_run,
    killed_at,
    untouched_end,
)
from tests.storenode import memory

#: An fsync changes nothing that a killed process could miss: the store is as it is before the next effect. ``make crash`` tries them all.
SAME = {"fsync"}
#: The effects are dealt out to so many tests, which run side by side.
SHARES = 4
#: One in so many effects; ``make crash`` has the others, too.
STEP = 3


@pytest.fixture
def folders() -> Iterator[Callable[[], Path]]:
    """Fresh folders in memory, where there is such a file system: a hundred stores are made here."""
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        numbers = iter(range(1 << 30))
        yield lambda: Path(folder, str(next(numbers)))


def test_the_effects_are_counted_and_a_run_has_hundreds(folders: Callable[[], Path]) -> None:
    names = effects_of_a_run(folders())

    assert len(names) > 200
    assert {"rename", "link", "symlink", "unlink", "mkdir", "write", "fsync", "fchmod", "ledger"} <= set(names)


@pytest.mark.parametrize("share", range(SHARES))
def test_the_next_run_ends_where_an_untouched_one_does(folders: Callable[[], Path], share: int) -> None:
    expected = untouched_end(folders())
    names = effects_of_a_run(folders())
    effects = [number for number, name in enumerate(names, start=1) if name not in SAME]

    violations = []
    for number in itertools.chain(effects[share :: SHARES * STEP], itertools.count(len(names) + 1)):
        root = folders()
        code = interrupted_run(root, killed_at(number))
        scene = Scene(root)
        found = [] if code in {KILLED, UNTOUCHED} else [f"the child exited with {code}"]
        found += scene.faults()
        scene.run()
        found += scene.faults()
        found += differences(scene.end(), expected)
        violations += [f"effect {number}: {text}" for text in found]
        if code == UNTOUCHED:
            break

    assert not violations, "\n".join(violations)


def test_a_killed_recovery_is_recovered(folders: Callable[[], Path]) -> None:
    expected = untouched_end(folders())
    effects = len(effects_of_a_run(folders()))

    violations = []
    for first, second in [(n, m) for n in range(3, effects, effects // 9) for m in range(2, 120, 41)]:
        root = folders()
        codes = [interrupted_run(root, killed_at(first)), interrupted_again(root, killed_at(second))]
        scene = Scene(root)
        found = scene.faults()
        scene.run()
        found += scene.faults()
        found += differences(scene.end(), expected)
        violations += [f"effects {first}, then {second} ({codes}): {text}" for text in found]

    assert not violations, "\n".join(violations)


def test_a_second_run_changes_nothing(folders: Callable[[], Path]) -> None:
    scene = Scene(folders())
    scene.prepare()
    scene.run()
    before = scene.node.layout.active.readlink()

    outcome = scene.node.run(scene.second)

    assert not outcome.changed
    assert scene.node.layout.active.readlink() == before
    assert scene.faults() == []
