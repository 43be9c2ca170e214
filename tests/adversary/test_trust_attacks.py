"""Attacks on who signed and when, one test or more for each; docs/attacks.md says which attack is refused where."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from reconciler.core import lock, trust
from reconciler.core.errors import (
    BadEnvelope,
    BadRootChain,
    BadSignature,
    Equivocation,
    Expired,
    NotYetValid,
    ReconcileError,
    Rollback,
    RootExpired,
    WrongNetwork,
)
from reconciler.core.node import Limits
from tests.hostile_network import FLOOR, HostileNetwork, Node, refused, two_of_three, verify
from tests.network import Network, compact, keys, signatures_of

# -- arbitrary installation -----------------------------------------------------------------------


def test_arbitrary_installation_by_a_stranger_is_refused() -> None:
    network = two_of_three()
    network.publish(network.model("good:v1"))
    node = Node(network)
    node.sync()
    network.served = network.snapshot(network.model("evil:v1"), signers=keys("stranger", 3))
    refused(node, BadSignature)


def test_arbitrary_installation_without_any_signature_is_refused() -> None:
    network = Network()
    with pytest.raises(BadSignature):
        verify(network, network.snapshot(network.model("evil:v1"), signers=[]))


def test_wrong_software_the_lock_names_the_signed_digest_and_no_other() -> None:
    network = Network()
    model = network.model("a:v1", b"the bytes that were signed")
    found = lock.compile(network.verified(model))
    (artifact,) = found.model[0].artifact
    assert artifact.digest == model["artifacts"][0]["digest"]
    assert set(found.blob) == {artifact.digest}
    assert found.blob[artifact.digest].size == len(b"the bytes that were signed")


# -- rollback, freeze, clocks ----------------------------------------------------------------------


def test_rollback_to_an_older_snapshot_is_refused() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    node.sync()
    network.publish(network.model("a:v2"))
    node.sync()
    network.replay(1)
    refused(node, Rollback)


def test_rollback_the_same_snapshot_again_is_no_error_and_changes_nothing() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    first = node.sync()
    trust_state, held = node.trust_state, node.held
    assert node.sync() == first
    assert (node.trust_state, node.held) == (trust_state, held)


def test_equivocation_two_snapshots_of_one_version_is_refused() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    node.sync()
    network.equivocate(1, network.model("b:v1"))
    refused(node, Equivocation)


def test_freeze_a_withheld_network_is_noticed_when_its_last_word_expires() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    node.sync()
    network.withhold()
    network.publish(network.model("a:v2"))
    network.pass_time(days=29)
    node.sync()
    network.pass_time(days=1)
    refused(node, Expired)
    assert b"a:v1" in node.held


def test_freeze_expiry_is_exact() -> None:
    network = Network()
    data = network.snapshot()
    end = network.now + timedelta(days=30)
    just_before = end - timedelta(microseconds=1)
    assert trust.verify(data, network.trusted(), now=just_before, trust_state=FLOOR).snapshot.version == 1
    with pytest.raises(Expired):
        trust.verify(data, network.trusted(), now=end, trust_state=FLOOR)


def test_freeze_of_roots_is_noticed_when_the_last_root_expires() -> None:
    network = Network()
    root = network.trusted()
    with pytest.raises(RootExpired):
        trust.verify(network.snapshot(), root, now=root.expires_at, trust_state=FLOOR)


def test_clock_set_back_before_the_accepted_snapshot_is_refused() -> None:
    network = two_of_three()
    node = Node(network)
    network.pass_time(days=20)
    network.publish(network.model("a:v1"))
    node.sync()
    node.clock_error = -timedelta(days=15)
    refused(node, NotYetValid)


def test_clock_that_was_ahead_for_one_sync_holds_the_node_to_nothing() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"), expires_at="2028-01-01T00:00:00Z")
    node.clock_error = timedelta(days=200)
    node.sync()
    node.clock_error = timedelta()
    node.sync()
    network.publish(network.model("a:v2"))
    node.sync()
    assert b"a:v2" in node.held


def test_clock_that_was_ahead_lets_no_older_snapshot_in() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"), expires_at="2028-01-01T00:00:00Z")
    network.publish(network.model("a:v2"), expires_at="2028-01-01T00:00:00Z")
    node.clock_error = timedelta(days=200)
    node.sync()
    network.replay(1)
    refused(node, Rollback)
    node.clock_error = timedelta()
    refused(node, Rollback)


def test_clock_set_back_does_not_bring_an_older_snapshot_that_expired_to_life() -> None:
    network = Network()
    root, old = network.trusted(), network.snapshot(version=7)
    network.now += timedelta(days=31)
    accepted = trust.advance_state(FLOOR, trust.verify(network.snapshot(version=8), root, now=network.now, trust_state=FLOOR))
    for now, error in ((network.now, Rollback), (network.now - timedelta(days=31), NotYetValid)):
        with pytest.raises(error):
            trust.verify(old, root, now=now, trust_state=accepted)


def test_clock_that_stands_at_the_beginning_of_its_time_is_behind_and_accepts_nothing() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    for seconds in (0, 1):
        node.clock_error = datetime.fromtimestamp(seconds, UTC) - network.now
        refused(node, NotYetValid)
    node.clock_error = timedelta()
    node.sync()


def test_clock_a_few_minutes_of_drift_are_no_attack() -> None:
    network = Network()
    data, root = network.snapshot(), network.trusted()
    trust_state = trust.TrustState(issued_at=network.now)
    assert trust.verify(data, root, now=network.now - timedelta(seconds=300), trust_state=trust_state).snapshot.version == 1


def test_clock_a_snapshot_from_the_future_is_refused() -> None:
    network = Network()
    data, root = network.snapshot(), network.trusted()
    with pytest.raises(NotYetValid):
        trust.verify(data, root, now=network.now - timedelta(seconds=301), trust_state=FLOOR)


def test_clock_the_newest_accepted_time_of_issue_never_goes_back() -> None:
    network = Network()
    late = trust.TrustState(version=1, issued_at=network.now + timedelta(hours=1))
    raised = trust.advance_state(late, network.verified())
    assert raised.issued_at == late.issued_at


# -- fast-forward ----------------------------------------------------------------------------------


def test_fast_forward_by_less_than_a_threshold_of_thieves_is_refused() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    node.sync()
    network.fast_forward(network.snapshot_keys[:1])
    refused(node, BadSignature)


def test_fast_forward_to_the_last_version_is_mended_by_other_keys() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    node.sync()
    stolen = network.snapshot_keys[:2]
    network.fast_forward(stolen)
    node.sync()
    network.version = 1
    network.pass_time(hours=1)
    network.publish(network.model("a:v2"))
    refused(node, Rollback)
    network.change_keys(snapshot_keys=network.fresh_keys("snapshot", 3))
    network.publish(network.model("a:v3"))
    node.sync()
    assert b"a:v3" in node.held
    network.fast_forward(stolen)
    refused(node, BadSignature)


def test_fast_forward_past_what_integers_hold_everywhere_is_refused() -> None:
    network = Network()
    with pytest.raises(BadEnvelope):
        verify(network, network.snapshot(version=2**53))


def test_rollback_through_a_change_of_keys_is_refused() -> None:
    """New keys begin a new count of versions: what was issued before the change must not come back with it."""
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    old = network.snapshots[0]
    network.pass_time(days=1)
    network.publish(network.model("a:v2"))
    node.sync()
    network.change_keys(snapshot_threshold=1)  # the old keys, another threshold: the old signatures hold still
    network.served = old
    with pytest.raises(Rollback):
        node.sync()
    assert b"a:v2" in node.held


def test_rollback_through_a_change_of_keys_within_one_second_is_refused() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    network.publish(network.model("a:v2"))
    node.sync()
    network.change_keys(snapshot_threshold=1)
    network.replay(1)
    with pytest.raises(Rollback):
        node.sync()


def test_a_change_of_keys_alone_keeps_the_accepted_snapshot() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    first = node.sync()
    network.change_keys(snapshot_threshold=1)
    assert node.sync() == first


# -- mix and match ---------------------------------------------------------------------------------


def test_mix_and_match_signatures_of_one_snapshot_under_another_is_refused() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    network.publish(network.model("a:v2"))
    node.sync()
    network.publish(network.model("a:v3"))
    network.mix(payload=3, signatures=2)
    refused(node, BadSignature)


def test_mix_and_match_signatures_gathered_from_two_snapshots_is_refused() -> None:
    network = two_of_three()
    document = network.snapshot_document(network.model("a:v1"))
    other = document | {"models": []}
    first = json.loads(network.sign_snapshot(document, network.snapshot_keys[:1]))
    second = network.sign_snapshot(other, network.snapshot_keys[1:2])
    with pytest.raises(BadSignature):
        verify(network, compact(first | {"signatures": [*first["signatures"], *signatures_of(second)]}))


def test_mix_and_match_a_lock_beside_another_envelope_is_refused() -> None:
    network = Network()
    old = lock.encode(lock.compile(network.verified(network.model("a:v1"))))
    with pytest.raises(ReconcileError, match=r"models\.lock is not what its snapshot compiles to: line"):
        lock.check(old, lock.compile(network.verified(network.model("a:v2"))))


def test_mix_and_match_another_networks_snapshot_under_the_same_keys_is_refused() -> None:
    production = Network("production")
    staging = production.snapshot(network="staging")
    with pytest.raises(WrongNetwork):
        verify(production, staging)


# -- fewer keys than the threshold -----------------------------------------------------------------


def test_key_compromise_below_the_threshold_is_refused() -> None:
    network = two_of_three()
    with pytest.raises(BadSignature, match="role: 1, needed"):
        verify(network, network.snapshot(signers=network.snapshot_keys[:1]))


def test_key_compromise_one_signature_repeated_counts_once() -> None:
    network = two_of_three()
    one = network.snapshot_keys[0]
    with pytest.raises(BadSignature, match="role: 1, needed"):
        verify(network, network.snapshot(signers=[one, one, one]))


def test_key_compromise_another_key_id_over_the_same_signature_counts_for_nothing() -> None:
    network = two_of_three()
    outer = json.loads(network.snapshot(signers=network.snapshot_keys[:1]))
    (mine,) = outer["signatures"]
    forged = [mine, *({"keyid": other.id, "sig": mine["sig"]} for other in network.snapshot_keys[1:])]
    with pytest.raises(BadSignature, match="role: 1, needed"):
        verify(network, compact(outer | {"signatures": forged}))


def test_key_compromise_a_key_under_a_second_id_is_refused_with_its_root() -> None:
    """The double count of other DSSE verifiers: one key listed twice met a threshold of two."""
    network = Network(snapshot_keys=1)
    document = network.root_document()
    (one,) = network.snapshot_keys
    alias = "0" * 64
    document["keys"][alias] = document["keys"][one.id]
    document["roles"]["snapshot"] = {"keyids": [one.id, alias], "threshold": 2}
    with pytest.raises(BadRootChain, match="not the hash"):
        trust.pin(network.sign_root(document))


def test_key_compromise_the_same_id_listed_twice_is_refused_with_its_root() -> None:
    network = Network()
    document = network.root_document()
    document["roles"]["snapshot"] = {"keyids": [network.snapshot_keys[0].id] * 2, "threshold": 2}
    with pytest.raises(BadRootChain, match="twice"):
        trust.pin(network.sign_root(document))


def test_key_compromise_a_root_key_signs_no_snapshot() -> None:
    network = Network()
    with pytest.raises(BadSignature):
        verify(network, network.snapshot(signers=network.root_keys))


def test_key_compromise_unknown_and_invalid_extra_signatures_are_ignored() -> None:
    network = two_of_three()
    outer = json.loads(network.snapshot(signers=[*keys("stranger", 3), *network.snapshot_keys[:2]]))
    outer["signatures"].insert(0, {"keyid": network.snapshot_keys[2].id, "sig": "AAAA"})
    outer["signatures"].insert(0, {"keyid": network.snapshot_keys[0].id, "sig": "not base64"})
    assert verify(network, compact(outer)).snapshot.version == 1


@pytest.mark.parametrize("threshold", [0, 2, -1, 1.0, True])
def test_key_compromise_a_threshold_that_protects_nothing_is_refused_with_its_root(threshold: Any) -> None:
    network = Network()
    document = network.root_document()
    document["roles"]["snapshot"]["threshold"] = threshold
    with pytest.raises((BadRootChain, BadEnvelope)):
        trust.pin(network.sign_root(document))


def test_key_compromise_a_role_without_keys_or_with_unknown_ones_is_refused_with_its_root() -> None:
    network = Network()
    for keyids in ([], ["f" * 64]):
        document = network.root_document()
        document["roles"]["snapshot"]["keyids"] = keyids
        with pytest.raises((BadRootChain, BadEnvelope)):
            trust.pin(network.sign_root(document))


# -- rotation --------------------------------------------------------------------------------------


def test_rotation_walks_step_by_step_and_old_keys_sign_no_more() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"))
    node.sync()
    gone = network.snapshot_keys
    for _ in range(3):
        network.change_keys(root_keys=network.fresh_keys("root", 3), snapshot_keys=network.fresh_keys("snapshot", 3))
    network.pass_time(hours=1)
    network.publish(network.model("a:v2"))
    node.sync()
    assert node.root.version == 4
    network.served = network.snapshot(network.model("evil:v1"), signers=gone)
    refused(node, BadSignature)


def test_rotation_not_signed_by_the_old_keys_is_refused() -> None:
    network = Network()
    root, thieves = network.trusted(), keys("thief", 1)
    network.root_keys, network.root_version = thieves, 2
    with pytest.raises(BadSignature):
        trust.advance(root, network.root())


def test_rotation_not_signed_by_the_new_keys_is_refused() -> None:
    network = Network()
    root, before = network.trusted(), list(network.root_keys)
    network.root_keys, network.root_version = keys("new", 1), 2
    with pytest.raises(BadSignature):
        trust.advance(root, network.root(signers=before))


def test_rotation_that_skips_a_version_is_refused() -> None:
    network = Network()
    root = network.trusted()
    network.root_version = 2
    with pytest.raises(BadRootChain, match="does not follow"):
        trust.advance(root, network.rotate())


def test_rotation_back_to_an_older_root_is_refused() -> None:
    network = Network()
    first = network.root()
    second = network.rotate()
    root = trust.advance(trust.pin(first), second)
    for old in (first, second):
        with pytest.raises(BadRootChain):
            trust.advance(root, old)
    assert trust.apply_root_chain(root, [first, second]) == root


def test_rotation_to_another_networks_root_is_refused() -> None:
    network = Network()
    root = network.trusted()
    with pytest.raises(WrongNetwork):
        trust.advance(root, network.rotate(network="other"))


def test_rotation_passes_over_an_expired_root_in_between_and_stops_at_an_expired_last() -> None:
    network = Network()
    root = network.trusted()
    past = "2020-01-01T00:00:00Z"
    expired = network.rotate(expires_at=past)
    last = network.rotate()
    data = network.snapshot()
    assert trust.verify(data, trust.apply_root_chain(root, [expired, last]), now=network.now, trust_state=FLOOR).root_version == 3
    with pytest.raises(RootExpired):
        trust.verify(data, trust.apply_root_chain(root, [expired]), now=network.now, trust_state=FLOOR)


def test_rotation_a_crash_between_two_steps_is_a_resume() -> None:
    network = HostileNetwork()
    node = Node(network)
    network.change_keys(root_keys=network.fresh_keys("root"))
    node.update_root()
    assert node.root.version == 2
    resumed = Node(network)
    resumed.root = trust.pin(network.roots[1])  # what was kept when the power went
    network.change_keys(snapshot_keys=network.fresh_keys("snapshot"))
    network.publish(network.model("a:v1"))
    resumed.sync()
    assert resumed.root.version == 3


def test_rotation_what_was_reached_is_kept_when_a_later_step_is_refused() -> None:
    network = HostileNetwork()
    node = Node(network)
    network.change_keys()
    network.roots.append(network.rotate(root_keys=keys("thief", 1)).replace(b'"sig"', b'"gis"', 1))
    with pytest.raises(BadEnvelope):
        node.update_root()
    assert node.root.version == 2


def test_rotation_without_end_is_refused() -> None:
    network = Network()
    root = network.trusted()
    with pytest.raises(BadRootChain, match="rotations"):
        trust.apply_root_chain(root, [network.root()] * 4, limits=Limits(root_rotations=3))


def test_pinning_another_root_than_the_one_whose_fingerprint_was_told_is_refused() -> None:
    network, evil = Network(), Network("evil")
    told = trust.fingerprint_of(compact(network.root_document()))
    assert trust.pin(network.root(), told).network == "testnet"
    assert trust.pin(network.root(), f"sha256:{told.upper()}".replace("SHA256", "sha256")).network == "testnet"
    with pytest.raises(BadRootChain, match="fingerprint"):
        trust.pin(evil.root(), told)


def test_pinning_a_root_that_its_own_keys_did_not_sign_is_refused() -> None:
    network = Network(root_keys=2, root_threshold=2)
    with pytest.raises(BadSignature):
        trust.pin(network.root(signers=network.root_keys[:1]))
