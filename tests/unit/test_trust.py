"""What trust gives back, and how its refusals read; the attacks are in tests/adversary."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from msgspec.structs import replace

from reconciler.core import lock, snapshot, strict_json, trust, units
from reconciler.core.errors import BadEnvelope, BadRootChain, BadSignature, ReconcileError, Rollback, TooLarge
from reconciler.core.node import Limits
from tests.network import NOW, Network, compact, envelope, keys


def test_a_verified_snapshot_says_what_was_signed_and_under_which_root() -> None:
    network = Network(snapshot_keys=2, snapshot_threshold=2)
    payload = compact(network.snapshot_document(network.model("a:v1")))
    root = network.trusted()
    found = trust.verify(network.sign_snapshot(payload), root, now=NOW, trust_state=trust.TrustState())
    assert found.digest == f"sha256:{trust.fingerprint_of(payload)}"
    assert (found.root_version, found.role) == (1, trust.signers(root))
    assert found.snapshot.models[0].id == "a:v1"


def test_who_may_sign_is_a_matter_of_keys_and_threshold_and_not_of_their_order() -> None:
    network = Network(snapshot_keys=3)
    root = network.trusted()
    role = root.roles.snapshot
    turned = replace(root, roles=replace(root.roles, snapshot=replace(role, keyids=role.keyids[::-1])))
    higher = replace(root, roles=replace(root.roles, snapshot=replace(role, threshold=2)))
    assert trust.signers(turned) == trust.signers(root) != trust.signers(higher)


def test_the_trust_state_is_what_was_accepted() -> None:
    network = Network()
    found = network.verified(version=4)
    trust_state = trust.advance_state(trust.TrustState(), found)
    assert (trust_state.version, trust_state.digest, trust_state.role) == (4, found.digest, found.role)
    assert trust_state.issued_at == NOW


def test_a_time_in_another_zone_is_the_same_instant() -> None:
    network = Network()
    tokyo = NOW.astimezone(timezone(timedelta(hours=9)))
    data = network.snapshot(issued_at=tokyo.isoformat())
    found = trust.verify(data, network.trusted(), now=NOW, trust_state=trust.TrustState(issued_at=NOW))
    assert lock.compile(found).snapshot.issued_at == NOW


def test_a_refusal_says_where() -> None:
    network = Network()
    model = network.model("a:v1")
    model["artifacts"][0]["digest"] = "sha256:short"
    with pytest.raises(BadEnvelope, match=r"models\[0\]\.artifacts\[0\]\.digest"):
        snapshot.decode(compact(network.snapshot_document(model)))


def test_a_refusal_for_too_few_signatures_says_how_many_there_are_and_are_needed() -> None:
    network = Network(snapshot_keys=3, snapshot_threshold=3)
    with pytest.raises(BadSignature, match=r"valid signatures by keys of the role: 2, needed: 3") as found:
        trust.open_snapshot(network.snapshot(signers=network.snapshot_keys[:2]), network.trusted())
    assert "operator" in found.value.hint


def test_opening_a_snapshot_asks_for_no_time_and_no_floor() -> None:
    network = Network()
    data = network.snapshot(issued_at="2001-01-01T00:00:00Z", expires_at="2001-01-02T00:00:00Z")
    assert trust.open_snapshot(data, network.trusted()).snapshot.version == 1


def test_a_smaller_cap_holds() -> None:
    network = Network()
    with pytest.raises(TooLarge, match="more than 100"):
        trust.open_snapshot(network.snapshot(), network.trusted(), limits=Limits(envelope_bytes=100))
    with pytest.raises(TooLarge, match="more than 100"):
        trust.pin(network.root(), limits=Limits(envelope_bytes=100))


def test_a_root_of_as_many_keys_as_there_may_be_fits_its_cap() -> None:
    network = Network(root_keys=64, root_threshold=64, snapshot_keys=64)
    data = network.root()
    assert len(data) < Limits().root_bytes / 5
    assert len(trust.pin(data).keys) == 128


def test_an_unknown_field_of_a_root_or_snapshot_is_carried_by_its_digest_and_ignored() -> None:
    network = Network()
    assert trust.pin(network.root(contact="ops@example.org")).network == "testnet"
    assert network.verified(jobs={"rate": 0.5}).snapshot.network == "testnet"


def test_a_root_at_the_rim_of_the_calendar_is_refused() -> None:
    network = Network()
    for year in ("0001", "1969", "9999"):
        with pytest.raises(BadRootChain, match="year"):
            trust.pin(network.root(expires_at=f"{year}-06-01T00:00:00Z"))


def test_a_root_version_orders_files_and_proves_nothing() -> None:
    forged = envelope(trust.ROOT_TYPE, compact(Network().root_document(version=9)), keys("anybody", 1))
    assert trust.root_version(forged) == 9
    with pytest.raises(ReconcileError):
        trust.pin(forged)


def test_the_refusal_after_a_change_of_keys_names_the_version() -> None:
    network = Network()
    root = network.trusted()
    trust_state = trust.TrustState(version=9, digest="sha256:x", role="other", issued_at=NOW)
    with pytest.raises(Rollback, match="snapshot 1 was not issued after"):
        trust.verify(network.snapshot(), root, now=NOW, trust_state=trust_state)


@pytest.mark.parametrize("year", [1970, 1999, 2026, 9998])
def test_a_time_is_written_with_four_digits_of_year(year: int) -> None:
    instant = datetime(year, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
    assert units.rfc3339(instant) == f"{year}-02-03T04:05:06Z"
    assert units.rfc3339(datetime(7, 1, 1, tzinfo=UTC)) == "0007-01-01T00:00:00Z"


def test_strict_json_takes_what_every_reader_reads_alike() -> None:
    text = b'{"a":-9223372036854775808,"b":18446744073709551615,"c":0.1,"d":1e3,"e":"\\ud83d\\ude00","f":[{"a":1},{"a":2}],"g":{}}'
    assert strict_json.decode(text, dict) == {
        "a": -(2**63), "b": 2**64 - 1, "c": 0.1, "d": 1000.0, "e": "\U0001f600", "f": [{"a": 1}, {"a": 2}], "g": {},
    }  # fmt: skip


def test_strict_json_takes_a_depth_of_thirty_two_and_no_more() -> None:
    for depth, taken in ((32, True), (33, False)):
        data = b"[" * depth + b"1" + b"]" * depth
        if taken:
            strict_json.decode(data, list)
        else:
            with pytest.raises(strict_json.NotStrict, match="deeper than 32"):
                strict_json.decode(data, list)


def test_an_odd_regular_expression_is_taken_without_a_word_on_standard_error(recwarn: pytest.WarningsRecorder) -> None:
    network = Network()
    smoke = {"expect": {"regex": "[[a]"}}
    assert network.verified(network.model("a:v1") | {"smoke": smoke}).snapshot.models[0].smoke.expect.regex == "[[a]"
    assert not recwarn.list


@pytest.mark.parametrize("regex", ["(", "*", "a{99999999999}", "(?P<n>a)(?P<n>b)", "(" * 2000 + ")" * 2000])
def test_a_broken_regular_expression_is_refused(regex: str) -> None:
    network = Network()
    with pytest.raises(BadEnvelope, match=r"smoke\.expect\.regex"):
        network.verified(network.model("a:v1") | {"smoke": {"expect": {"regex": regex}}})
