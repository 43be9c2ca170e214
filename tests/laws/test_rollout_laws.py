"""Rollouts: who is in, that a wider step takes nothing away, and that whoever is not in sees the list as if nothing were coming."""

from __future__ import annotations

import hashlib
import math
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core import lock as locks
from reconciler.core import rollout, snapshot
from reconciler.core.errors import BadEnvelope
from reconciler.core.lock import Lock
from reconciler.core.snapshot import Rollout
from tests.network import Document, Network, compact

NETWORK = Network()
IDS = [str(uuid.UUID(int=index)) for index in range(10_000)]


def compiled(*models: Document, **rollouts: Any) -> Lock:
    return locks.compile(NETWORK.verified(*models, rollouts=rollouts))


def model(name: str, **changes: Any) -> Document:
    return NETWORK.model(name, **changes)


def states(lock: Lock, node: str = "n", cohorts: tuple[str, ...] = ()) -> dict[str, str]:
    return {one.id: one.state for one in rollout.for_node(lock, node, cohorts).model}


def test_the_place_is_the_one_that_the_contract_defines() -> None:
    digits = hashlib.sha256(b"testnet\x002026-12\x00node-1").hexdigest()[:16]
    assert rollout.place("testnet", "2026-12", "node-1") == int(digits, 16) % 10_000


def test_places_are_uniform_and_each_rollout_has_its_own_order() -> None:
    places = [rollout.place("testnet", "2026-12", name) for name in IDS]
    for share in (100, 2_500, 5_000, 9_900):
        sigma = math.sqrt(len(IDS) * share / 10_000 * (1 - share / 10_000))
        assert abs(sum(place < share for place in places) - len(IDS) * share / 10_000) <= 3 * sigma
    others = [rollout.place("testnet", "2027-01", name) for name in IDS]
    both = sum(one < 5_000 and other < 5_000 for one, other in zip(places, others, strict=True))
    assert abs(both - 2_500) < 200


@given(st.text(min_size=1, max_size=20), st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_wider_step_takes_a_model_away_from_nobody(node: str, one: int, other: int) -> None:
    narrow, wide = (Rollout(per_10000=share) for share in sorted((one, other)))
    assert rollout.is_in("n", "r", wide, node, ()) >= rollout.is_in("n", "r", narrow, node, ())
    assert not rollout.is_in("n", "r", Rollout(per_10000=0), node, ())
    assert rollout.is_in("n", "r", Rollout(per_10000=10_000), node, ())


def test_a_cohort_is_in_whatever_its_place_and_no_other_is() -> None:
    canary = Rollout(cohorts=("canary",))
    assert rollout.is_in("n", "r", canary, "x", ("blue", "canary"))
    assert not rollout.is_in("n", "r", canary, "x", ("canar", "Canary", ""))


def test_a_node_without_an_id_comes_last() -> None:
    assert not rollout.is_in("n", "r", Rollout(per_10000=9_999), "", ())
    assert rollout.is_in("n", "r", Rollout(per_10000=10_000), "", ())


@pytest.mark.parametrize("state", ["enabled", "retired", "archived"])
def test_whoever_is_not_in_keeps_what_would_be_replaced(state: str) -> None:
    lock = compiled(model("a:v1", state=state), model("a:v2", replaces=["a:v1"]), wave={"models": ["a:v2"], "cohorts": ["canary"]})
    assert states(lock) == {"a:v1": "enabled"}
    assert states(lock, cohorts=("canary",)) == {"a:v1": state, "a:v2": "enabled"}


def test_what_the_network_disabled_stays_disabled() -> None:
    lock = compiled(model("a:v1", state="disabled"), model("a:v2", replaces=["a:v1"]), wave={"models": ["a:v2"]})
    assert states(lock) == {"a:v1": "disabled"}


def test_of_a_chain_the_last_version_that_is_for_this_node_serves() -> None:
    chain = (model("a:v1", state="retired"), model("a:v2", state="retired", replaces=["a:v1"]), model("a:v3", replaces=["a:v2", "a:v1"]))
    assert states(compiled(*chain, wave={"models": ["a:v3"]})) == {"a:v1": "retired", "a:v2": "enabled"}
    assert states(compiled(*chain, wave={"models": ["a:v3", "a:v2"]})) == {"a:v1": "enabled"}


def test_a_model_of_two_rollouts_is_for_nodes_that_are_in_both() -> None:
    lock = compiled(model("a:v2"), one={"models": ["a:v2"], "cohorts": ["x"]}, two={"models": ["a:v2"], "cohorts": ["y"]})
    assert states(lock, cohorts=("x",)) == {}
    assert states(lock, cohorts=("x", "y")) == {"a:v2": "enabled"}


def test_what_is_not_for_this_node_keeps_no_blob() -> None:
    lock = compiled(model("a:v1", state="retired"), model("a:v2", replaces=["a:v1"]), wave={"models": ["a:v2"]})
    seen = rollout.for_node(lock, "n", ())
    assert set(seen.blob) == set(seen.model[0].blobs)


def test_the_lock_is_the_same_on_every_node_and_reads_back() -> None:
    lock = compiled(model("a:v2"), wave={"models": ["a:v2", "a:v2"], "per_10000": 100, "cohorts": ["b", "a"]})
    data = locks.encode(lock)
    assert locks.decode(data) == lock
    assert b"[rollouts.wave]" in data
    assert lock.rollouts["wave"] == Rollout(models=("a:v2",), per_10000=100, cohorts=("a", "b"))
    assert b"rollouts" not in locks.encode(compiled(model("a:v2")))


@pytest.mark.parametrize(
    "wrong", [{"per_10000": 10_001}, {"per_10000": -1}, {"per_10000": 1.5}, {"models": ["a"]}, {"cohorts": [""]}, {"cohorts": "canary"}]
)
def test_a_rollout_that_is_none_is_refused(wrong: Document) -> None:
    with pytest.raises(BadEnvelope):
        snapshot.decode(compact(NETWORK.snapshot_document(rollouts={"wave": {"models": []} | wrong})))


def test_a_name_that_could_forge_another_place_is_refused() -> None:
    with pytest.raises(BadEnvelope, match="not printable"):
        snapshot.decode(compact(NETWORK.snapshot_document(rollouts={"a\0b": {"models": []}})))
