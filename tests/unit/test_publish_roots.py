"""Roots on their way through their signers' hands."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from reconciler.core import dsse, trust
from reconciler.core.errors import BadRootChain, BadSignature, PublishError, TrustError
from reconciler.publish import envelopes, keys, roots
from tests.network import Key, Network, compact, envelope, payload_of, signatures_of

END = datetime(2027, 11, 20, tzinfo=UTC)
ALICE, BOB, CAROL, DAVE = (Key(name) for name in ("alice", "bob", "carol", "dave"))


def public(key: Key) -> keys.PublicKey:
    return keys.load_public(key.pem.encode())


def new(root: tuple[Key, ...] = (ALICE, BOB), threshold: int = 2, snapshots: tuple[Key, ...] = (CAROL,)) -> bytes:
    return roots.new("testnet", END, ([public(key) for key in root], threshold), ([public(key) for key in snapshots], 1))


def signed(*signers: Key, data: bytes = b"", previous: bytes = b"") -> bytes:
    data = data or new()
    for key in signers:
        data = roots.sign(data, key.private, previous=previous)
    return data


def test_a_new_root_is_refused_by_nodes_until_enough_signed_it_in_turn() -> None:
    data = new()
    for key, missing in ((ALICE, 2), (BOB, 1)):
        assert roots.inspect(data).missing == missing
        with pytest.raises(BadSignature):
            trust.pin(data)
        data = roots.sign(data, key.private)
    assert roots.inspect(data).complete
    root = trust.pin(data, roots.inspect(data).fingerprint)
    assert (root.network, root.version, root.expires_at) == ("testnet", 1, END)


def test_signing_leaves_the_payload_and_the_others_signatures_as_they_are() -> None:
    first = signed(ALICE)
    both = signed(BOB, data=first)
    assert payload_of(both) == payload_of(first)
    assert signatures_of(both)[0] == signatures_of(first)[0]
    assert signed(ALICE, BOB, data=both) == both, "signing twice adds nothing"


def test_a_signature_that_does_not_hold_is_replaced_by_its_owner() -> None:
    document = envelopes.read(new(), trust.ROOT_TYPE)
    broken = envelopes.Document(kind=document.kind, payload=document.payload, signatures=(dsse.Signature(keyid=ALICE.id, sig="AAAA"),))
    data = envelopes.write(broken)
    assert [one.valid for one in roots.inspect(data).signatures] == [False]
    assert [one.valid for one in roots.inspect(signed(ALICE, data=data)).signatures] == [True]


def test_a_strangers_key_is_refused() -> None:
    with pytest.raises(PublishError, match="not in the root role"):
        signed(DAVE)
    with pytest.raises(PublishError, match="not in the root role"):
        signed(CAROL)


def test_a_root_that_protects_nothing_is_never_written() -> None:
    with pytest.raises(PublishError, match="asks for 3 signatures and has 2 keys"):
        new(threshold=3)
    with pytest.raises(PublishError):
        roots.new("Not A Name", END, ([public(ALICE)], 1), ([public(CAROL)], 1))
    with pytest.raises(PublishError, match="asks for 2 signatures"):
        roots.new("testnet", END, ([public(ALICE), public(ALICE)], 2), ([public(CAROL)], 1))


def test_a_root_that_protects_nothing_is_never_signed() -> None:
    network = Network()
    document = network.root_document()
    document["roles"]["root"]["threshold"] = 2
    data = envelope(trust.ROOT_TYPE, compact(document), [])
    with pytest.raises(BadRootChain):
        roots.sign(data, network.root_keys[0].private)
    with pytest.raises(BadRootChain):
        roots.pae(data)


def test_an_edit_of_an_unsigned_root_keeps_its_version_and_of_a_signed_one_makes_the_next() -> None:
    def grow(root: trust.TrustRoot) -> trust.TrustRoot:
        return roots.with_key(root, public(DAVE), ["snapshot"])

    assert roots.inspect(roots.edit(new(), grow)).version == 1
    following = roots.inspect(roots.edit(signed(ALICE), grow))
    assert (following.version, following.signatures) == (2, ())
    assert following.roles.snapshot.keyids == (CAROL.id, DAVE.id)


def test_the_next_root_needs_keys_of_both_and_nodes_then_follow() -> None:
    first = signed(ALICE, BOB)
    second = roots.edit(first, lambda root: roots.with_key(root, public(DAVE), ["root"]))
    second = roots.edit(second, lambda root: roots.without_key(root, ALICE.id, ["root"]))
    with pytest.raises(PublishError, match="not in the root role") as found:
        signed(ALICE, data=second)
    assert "--previous" in found.value.hint
    second = signed(BOB, DAVE, data=second)
    assert roots.inspect(second).missing_previous == -1
    report = roots.inspect(second, previous=first)
    assert (report.missing, report.missing_previous, report.complete) == (0, 1, False)
    with pytest.raises(BadSignature):
        trust.advance(trust.pin(first), second)
    second = signed(ALICE, data=second, previous=first)
    assert roots.inspect(second, previous=first).complete
    assert trust.advance(trust.pin(first), second).version == 2


def test_another_root_than_the_one_before_is_not_taken_for_it() -> None:
    first = signed(ALICE, BOB)
    second = roots.edit(first, lambda root: root)
    third = roots.edit(signed(ALICE, data=second), lambda root: root)
    with pytest.raises(BadRootChain, match="root 3 of 'testnet' does not follow root 1"):
        roots.sign(third, ALICE.private, previous=first)


def test_a_key_that_is_in_no_role_any_more_is_not_carried_on() -> None:
    data = roots.edit(new(), lambda root: roots.with_key(root, public(DAVE), ["snapshot"]))
    data = roots.edit(data, lambda root: roots.without_key(root, CAROL.id[:8], ["snapshot"]))
    assert set(payload_of(data)["keys"]) == {ALICE.id, BOB.id, DAVE.id}


def test_a_key_cannot_be_added_twice_nor_the_last_one_needed_removed() -> None:
    with pytest.raises(PublishError, match="already"):
        roots.edit(new(), lambda root: roots.with_key(root, public(ALICE), ["root"]))
    for keyid in (ALICE.id, CAROL.id):
        with pytest.raises(PublishError, match="left") as found:
            roots.edit(new(), lambda root, keyid=keyid: roots.without_key(root, keyid, ["root", "snapshot"]))  # type: ignore[misc]
        assert "add the new key first" in found.value.hint


@pytest.mark.parametrize("name", ["", "f" * 64, "abc", ALICE.id[:7], "/etc/passwd"])
def test_a_key_is_named_by_enough_of_its_id(name: str) -> None:
    with pytest.raises(PublishError, match="keys of this root are named"):
        roots.edit(new(), lambda root: roots.without_key(root, name, ["root"]))


def test_thresholds_and_the_end_can_be_changed() -> None:
    data = roots.edit(new(), lambda root: roots.with_expiry(roots.with_threshold(root, "root", 1), datetime(2030, 1, 1, tzinfo=UTC)))
    report = roots.inspect(data)
    assert (report.roles.root.threshold, report.expires_at.year) == (1, 2030)
    with pytest.raises(PublishError):
        roots.edit(new(), lambda root: roots.with_threshold(root, "snapshot", 2))


def test_fields_that_this_program_does_not_know_are_carried_along_byte_for_byte() -> None:
    network = Network()
    odd = b'{"contact":{"b":1.0,"a":[1e5,"\\u00fc"]},' + compact(network.root_document())[1:]
    data = roots.edit(envelope(trust.ROOT_TYPE, odd, []), lambda root: root)
    assert b'"contact":{"b":1.0,"a":[1e5,"\\u00fc"]}' in envelopes.read(data, trust.ROOT_TYPE).payload


def test_a_signature_made_elsewhere_is_attached_and_a_wrong_one_is_not() -> None:
    data = new()
    good = ALICE.private.sign(roots.pae(data))
    assert roots.attach(data, public(ALICE), good) == signed(ALICE, data=data)
    wrong: list[Any] = [BOB.private.sign(roots.pae(data)), ALICE.private.sign(b"something else"), b"", bytes(64)]
    for signature in wrong:
        with pytest.raises(BadSignature, match="not one of key"):
            roots.attach(data, public(ALICE), signature)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", Network().snapshot(), b"[" * 1000, b" " * (600 << 10)])
def test_what_is_no_root_is_refused(data: bytes) -> None:
    for read in (roots.inspect, roots.pae, roots.is_signed, lambda data: roots.sign(data, ALICE.private)):
        with pytest.raises(TrustError):
            read(data)


# -- labels ----------------------------------------------------------------------------------------


def test_a_label_is_signed_with_the_root_shown_beside_its_key_and_gone_with_it() -> None:
    data = roots.edit(new(), lambda root: roots.with_label(root, ALICE.id[:8], "release key, 2026"))
    data = roots.edit(data, lambda root: roots.with_label(root, CAROL.id, "CI"))
    assert payload_of(data)["labels"] == {ALICE.id: "release key, 2026", CAROL.id: "CI"}
    data = signed(ALICE, BOB, data=data)
    assert {one.keyid: one.label for one in roots.inspect(data).signatures} == {ALICE.id: "release key, 2026", BOB.id: ""}
    assert trust.pin(data).named(ALICE.id, 16) == f'{ALICE.id[:16]}… "release key, 2026"'
    data = roots.edit(data, lambda root: roots.without_key(roots.with_key(root, public(DAVE), ["root"]), ALICE.id, ["root"]))
    assert payload_of(data)["labels"] == {CAROL.id: "CI"}
    assert "labels" not in payload_of(roots.edit(data, lambda root: roots.with_label(root, CAROL.id, "")))


@pytest.mark.parametrize("label", ["\x1b[31mred", "two\nlines", "x" * 81, " space", "\u202edetrevni", "CI"])
def test_a_label_that_could_deceive_who_reads_it_is_not_written(label: str) -> None:
    data = roots.edit(new(), lambda root: roots.with_label(root, CAROL.id, "CI"))
    with pytest.raises(PublishError, match="label"):
        roots.edit(data, lambda root: roots.with_label(root, ALICE.id, label))


@pytest.mark.parametrize("labels", [3, None, [], {}, {"x": 1}, {ALICE.id: ["a"]}, {ALICE.id: "\x1b[31m" + "x" * 999}])
def test_no_root_is_refused_for_its_labels_since_older_versions_accept_it(labels: object) -> None:
    network = Network()
    root = trust.pin(network.root(labels=labels))
    assert root.verifiers.keys() == network.trusted().verifiers.keys()
    assert root.label(ALICE.id).isprintable()
    assert len(root.label(ALICE.id)) < 4 * trust.LABEL_LENGTH
    trust.advance(root, network.rotate(labels=labels))
