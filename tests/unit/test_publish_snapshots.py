"""Snapshots on their way through their signers' hands."""

from __future__ import annotations

import base64
import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reconciler.core import dsse, snapshot, trust
from reconciler.core.errors import BadSignature, PublishError, TooLarge, TrustError, WrongNetwork
from reconciler.core.snapshot import Model
from reconciler.publish import artifacts, differences, envelopes, keys, snapshots
from tests.network import NOW, Network, compact, envelope, payload_of, signatures_of

NETWORK = Network(snapshot_keys=3, snapshot_threshold=2)
ROOT = NETWORK.trusted()
ALICE, BOB, CAROL = NETWORK.snapshot_keys
LATER = NOW + timedelta(days=3)


def new() -> bytes:
    return snapshots.new("testnet", now=NOW, lifetime=timedelta(days=30))


def model(name: str = "a:v1", data: bytes = b"") -> Model:
    return msgspec.convert(NETWORK.model(name, data), Model)


def with_models(*names: str) -> bytes:
    data = new()
    for name in names:
        data = snapshots.edit(data, lambda found, name=name: snapshots.with_model(found, model(name)), now=NOW).data  # type: ignore[misc]
    return data


def test_an_unsigned_snapshot_is_refused_by_nodes_until_enough_signed_it_in_turn() -> None:
    data = with_models("a:v1")
    for key, missing in ((ALICE, 2), (BOB, 1)):
        assert snapshots.inspect(data, root=ROOT).missing == missing
        with pytest.raises(BadSignature):
            trust.verify(data, ROOT, now=NOW, trust_state=trust.TrustState())
        data = snapshots.sign(data, key.private, now=NOW, root=ROOT)
    assert snapshots.inspect(data, root=ROOT).missing == 0
    assert trust.verify(data, ROOT, now=NOW, trust_state=trust.TrustState()).snapshot.models == (model(),)


def test_signing_leaves_the_payload_and_the_others_signatures_as_they_are() -> None:
    first = snapshots.sign(with_models("a:v1"), ALICE.private, now=NOW)
    both = snapshots.sign(first, BOB.private, now=NOW)
    assert payload_of(both) == payload_of(first)
    assert signatures_of(both)[:1] == signatures_of(first)
    assert snapshots.sign(both, ALICE.private, now=LATER) == both


def test_an_edit_drops_the_signatures_says_whose_and_makes_the_next_version() -> None:
    data = snapshots.sign(with_models("a:v1"), ALICE.private, now=NOW)
    edited = snapshots.edit(data, lambda found: snapshots.with_state(found, "a:v1", "archived"), now=LATER)
    assert (edited.version, edited.dropped) == (2, (ALICE.id,))
    again = snapshots.edit(edited.data, lambda found: snapshots.without_model(found, "a:v1"), now=LATER)
    assert (again.version, again.dropped) == (2, ())


def test_an_edit_is_issued_anew_and_lives_as_long_as_was_meant() -> None:
    found = snapshots.inspect(snapshots.edit(new(), lambda found: found, now=LATER).data)
    assert (found.issued_at, found.expires_at) == (LATER, LATER + timedelta(days=30))
    found = snapshots.inspect(snapshots.edit(new(), lambda found: found, now=LATER, lifetime=timedelta(days=1)).data)
    assert found.expires_at == LATER + timedelta(days=1)


def test_a_duplicate_is_refused() -> None:
    with pytest.raises(PublishError, match="lists a:v1 already") as refused:
        with_models("a:v1", "a:v1")
    assert refused.value.hint.startswith("another content is another version, as in name:v2")
    with pytest.raises(PublishError, match="duplicate id"):
        with_models("a:v1", "a:V1")


def test_a_model_that_is_not_listed_is_neither_removed_nor_changed() -> None:
    with pytest.raises(PublishError, match="lists no model 'b:v1'"):
        snapshots.edit(with_models("a:v1"), lambda found: snapshots.without_model(found, "b:v1"), now=NOW)
    with pytest.raises(PublishError, match="lists no model 'b:v1'"):
        snapshots.edit(with_models("a:v1"), lambda found: snapshots.with_state(found, "b:v1", "disabled"), now=NOW)


@pytest.mark.parametrize(
    "change",
    [{"name": "../x"}, {"version": ""}, {"tasks": ()}, {"entrypoint": "elsewhere"}, {"gpu_memory": -1}, {"artifacts": ()}],
)
def test_an_invalid_model_is_never_written(change: dict[str, object]) -> None:
    broken = msgspec.structs.replace(model(), **change)
    with pytest.raises(PublishError, match="nodes would refuse this snapshot"):
        snapshots.edit(new(), lambda found: snapshots.with_model(found, broken), now=NOW)


def test_an_invalid_snapshot_is_never_written() -> None:
    for change in ({"network": "No Name"}, {"version": 0}, {"fallback": ("ftp://h/{hex}",)}, {"retest_after": "soon"}):
        with pytest.raises(PublishError):
            snapshots.new(**({"network": "testnet", "now": NOW, "lifetime": timedelta(days=1)} | change))  # type: ignore[arg-type]
    with pytest.raises(PublishError, match="expires_at is not after"):
        snapshots.new("testnet", now=NOW, lifetime=timedelta(0))


def test_an_invalid_snapshot_is_never_signed() -> None:
    broken = envelope(trust.SNAPSHOT_TYPE, compact(NETWORK.snapshot_document() | {"schema": 2}), [])
    with pytest.raises(TrustError):
        snapshots.sign(broken, ALICE.private, now=NOW)
    with pytest.raises(TrustError):
        snapshots.pae(broken)


def test_an_expired_snapshot_is_not_signed() -> None:
    with pytest.raises(PublishError, match="nodes would refuse it"):
        snapshots.sign(new(), ALICE.private, now=NOW + timedelta(days=30))


def test_a_key_that_may_not_sign_is_told_so_where_the_root_is_at_hand() -> None:
    with pytest.raises(PublishError, match="may not sign"):
        snapshots.sign(new(), NETWORK.root_keys[0].private, now=NOW, root=ROOT)
    with pytest.raises(WrongNetwork):
        snapshots.sign(new(), ALICE.private, now=NOW, root=Network("other").trusted())


def test_a_signature_made_elsewhere_is_attached_and_a_wrong_one_is_not() -> None:
    data = new()
    public = keys.load_public(ALICE.pem.encode())
    good = ALICE.private.sign(snapshots.pae(data))
    assert snapshots.attach(data, public, good, now=NOW) == snapshots.sign(data, ALICE.private, now=NOW)
    for signature in (BOB.private.sign(snapshots.pae(data)), ALICE.private.sign(payload(data)), b"x" * 64, b""):
        with pytest.raises(BadSignature, match="not one of key"):
            snapshots.attach(data, public, signature, now=NOW)


def payload(data: bytes) -> bytes:
    return envelopes.read(data, trust.SNAPSHOT_TYPE).payload


def test_a_signature_comes_raw_or_in_base64() -> None:
    raw = bytes(range(64))
    text = base64.b64encode(raw)
    for data in (raw, text, text + b"\n"):
        assert envelopes.decode_signature(data) == raw
    for data in (b"", raw[:-1], b"x" * 88, text[:-4], b"\xff" * 65):
        with pytest.raises(BadSignature):
            envelopes.decode_signature(data)


def test_no_more_signatures_than_nodes_look_at() -> None:
    data = new()
    many = tuple(dsse.Signature(keyid=f"{index:064x}", sig="AAAA") for index in range(64))
    document = msgspec.structs.replace(envelopes.read(data, trust.SNAPSHOT_TYPE), signatures=many)
    with pytest.raises(PublishError, match="64 signatures already"):
        snapshots.sign(envelopes.write(document), ALICE.private, now=NOW)


def test_a_document_that_nodes_would_refuse_for_its_size_is_never_written() -> None:
    with pytest.raises(TooLarge):
        envelopes.write(envelopes.Document(kind=trust.SNAPSHOT_TYPE, payload=bytes(13 << 20)))


def test_fields_that_this_program_does_not_know_are_carried_along_byte_for_byte() -> None:
    odd = b'{"jobs":{"z":1.50,"a":[1e5,"\\u00fc",18446744073709551615]},' + compact(NETWORK.snapshot_document())[1:]
    edited = snapshots.edit(envelope(trust.SNAPSHOT_TYPE, odd, []), lambda found: snapshots.with_model(found, model()), now=NOW)
    assert b'"jobs":{"z":1.50,"a":[1e5,"\\u00fc",18446744073709551615]}' in payload(edited.data)
    assert snapshots.inspect(edited.data).other_fields == ("jobs",)


def with_fields(**changes: Any) -> bytes:
    """Return an unsigned snapshot of one model with *changes*."""
    return envelope(trust.SNAPSHOT_TYPE, compact(NETWORK.snapshot_document(NETWORK.model("a:v1", **changes))), [])


def test_fields_inside_a_model_are_carried_along_through_a_change_and_go_with_their_model() -> None:
    given = NETWORK.model("a:v1", smoke={"colour": [1, 2]}, colour={"red": 1.5})
    given["artifacts"][0]["colour"] = "blue"
    data = envelope(trust.SNAPSHOT_TYPE, compact(NETWORK.snapshot_document(given, sources={"colour": True})), [])
    places = ("sources.colour", "models[0].smoke.colour", "models[0].colour", "models[0].artifacts[0].colour")
    assert sorted(snapshots.inspect(data).other_fields) == sorted(places)

    edited = snapshots.edit(
        data, lambda found: snapshots.with_state(snapshots.with_model(found, model("b:v1")), "a:v1", "disabled"), now=NOW
    ).data

    assert sorted(snapshots.inspect(edited).other_fields) == sorted(places)
    kept = payload_of(edited)["models"][0]
    assert (kept["state"], kept["colour"], kept["smoke"]["colour"], kept["artifacts"][0]["colour"]) == (
        "disabled",
        {"red": 1.5},
        [1, 2],
        "blue",
    )
    gone = snapshots.edit(edited, lambda found: snapshots.without_model(found, "a:v1"), now=NOW).data
    assert snapshots.inspect(gone).other_fields == ("sources.colour",)


def test_diff_shows_a_change_of_a_field_that_this_program_does_not_know() -> None:
    (change,) = differences.diff(with_fields(colour="red"), with_fields(colour="blue")).changed
    assert (change.id, change.field, change.before, change.after) == ("a:v1", "colour", "red", "blue")


@pytest.mark.parametrize("changes", [{"state": "paused"}, {"tasks": ["completion", "rerank"]}, {"requires": ["moonlight"]}])
def test_a_word_that_nodes_of_this_version_do_not_know_is_neither_signed_nor_kept(changes: dict[str, object]) -> None:
    data = with_fields(**changes)
    said = "a:v1: this version of reconcile does not know"
    with pytest.raises(PublishError, match=said):
        snapshots.sign(data, ALICE.private, now=NOW)
    with pytest.raises(PublishError, match=said):
        snapshots.edit(data, lambda found: snapshots.with_model(found, model("b:v1")), now=NOW)
    snapshots.edit(data, lambda found: snapshots.without_model(found, "a:v1"), now=NOW)


@pytest.mark.parametrize(
    ("field", "meant"), [("gpu_memmory", "gpu_memory"), ("require", "requires"), ("Tasks", "tasks"), ("network", "network")]
)
def test_a_misspelt_field_is_not_signed(field: str, meant: str) -> None:
    with pytest.raises(PublishError, match=rf"models\[0\]\.{field}") as refusal:
        snapshots.sign(with_fields(**{field: 1}), ALICE.private, now=NOW)
    assert meant in refusal.value.hint


def test_a_field_that_is_no_misspelling_is_signed() -> None:
    snapshots.sign(with_fields(job_parameters={"price": 1}), ALICE.private, now=NOW)


def test_what_is_written_decodes_to_what_was_said() -> None:
    found = snapshot.decode(payload(with_models("b:v1", "a:v1")))
    assert found.models == (model("b:v1"), model("a:v1"))
    assert found.expires_at - found.issued_at == timedelta(days=30)


def test_inspect_tells_whose_signatures_hold() -> None:
    data = snapshots.sign(with_models("a:v1"), ALICE.private, now=NOW)
    data = snapshots.sign(data, NETWORK.root_keys[0].private, now=NOW)
    report = snapshots.inspect(data, root=ROOT)
    assert [(one.keyid, one.valid) for one in report.signatures] == [(ALICE.id, True), (NETWORK.root_keys[0].id, False)]
    assert report.missing == 1
    blind = snapshots.inspect(data)
    assert ([one.valid for one in blind.signatures], blind.missing) == ([None, None], -1)


def test_inspect_counts_a_shared_blob_once() -> None:
    data = new()
    for name in ("a:v1", "b:v1"):
        data = snapshots.edit(data, lambda found, name=name: snapshots.with_model(found, model(name, b"12345")), now=NOW).data  # type: ignore[misc]
    assert snapshots.inspect(data).bytes == 5


def test_diff_says_what_a_node_would_see() -> None:
    before = with_models("a:v1", "b:v1")
    after = snapshots.edit(before, lambda found: snapshots.without_model(found, "a:v1"), now=NOW).data
    after = snapshots.edit(after, lambda found: snapshots.with_model(found, model("c:v1")), now=NOW).data
    after = snapshots.edit(after, lambda found: snapshots.with_state(found, "b:v1", "disabled"), now=NOW).data
    found = differences.diff(before, after)
    assert (found.added, found.removed) == (("c:v1",), ("a:v1",))
    assert [(one.id, one.field, one.before, one.after) for one in found.changed] == [("b:v1", "state", "enabled", "disabled")]
    assert differences.diff(before, before).changed == ()


def test_diff_says_when_a_field_that_this_program_does_not_know_changed() -> None:
    first, second = (NETWORK.sign_snapshot(NETWORK.snapshot_document(jobs=rate), []) for rate in (1, 2))
    assert [(one.id, one.field, one.before, one.after) for one in differences.diff(first, second).changed] == [("", "jobs", 1, 2)]


def test_diff_of_two_networks_is_refused() -> None:
    with pytest.raises(WrongNetwork):
        differences.diff(new(), Network("other").snapshot())


# -- artifacts -------------------------------------------------------------------------------------


def test_a_file_is_measured_whole(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000
    (tmp_path / "file").write_bytes(data)
    found = artifacts.measure(artifacts.read_chunks(tmp_path / "file", max_bytes=len(data)), head_bytes=1000)
    assert (found.digest, found.size, found.head) == (f"sha256:{hashlib.sha256(data).hexdigest()}", len(data), data[:1000])
    assert "head" not in repr(found)


def test_an_empty_large_missing_or_odd_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(b"123")
    for name, why in (("empty", "is empty"), ("large", "more than 2"), ("missing", "cannot be read"), (".", "cannot be read")):
        with pytest.raises(PublishError, match=why):
            artifacts.measure(artifacts.read_chunks(tmp_path / name, max_bytes=2))
    with pytest.raises(PublishError, match="not a plain file"):
        artifacts.measure(artifacts.read_chunks(Path("/dev/null"), max_bytes=2))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1" * 10)
    chunks = artifacts.read_chunks(path, max_bytes=100)
    next(chunks)
    with path.open("ab") as file:
        file.write(b"2")
    with pytest.raises(PublishError, match="changed while it was read"):
        list(chunks)
