"""Attacks on what a network's operator believes of its nodes. Each is red against a reader that only decodes."""

from __future__ import annotations

import base64
import json
import os
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from reconciler.core.errors import BadSignature, SettingsError, UsageError
from reconciler.fleet import assess, collect, page, statement
from reconciler.fleet.collect import Collected
from reconciler.fleet.register import Register
from reconciler.fleet.statement import ReportedModel
from tests.fleet import MODEL, NOW, Member, enroll
from tests.network import Key, envelope

FAILED = ReportedModel(id="a:v1", state="failed", reason="failed-before", detail="smoke-failed: it gave no token")


class Fleet:
    """A folder of statuses, and the operator's folder of keys."""

    def __init__(self, folder: Path) -> None:
        self.statuses, self.keys = folder / "statuses", folder / "keys"
        self.statuses.mkdir()
        self.one, self.other = Member("one"), Member("other")
        enroll(self.keys, self.one, self.other)

    def put(self, name: str, data: bytes) -> None:
        (self.statuses / name).write_bytes(data)

    def read(self, **given: object) -> Collected:
        register = Register(self.keys)
        found = collect.collect(collect.in_folder(self.statuses), register, now=NOW, stale_seconds=10_800.0, **given)  # type: ignore[arg-type]
        register.remember(found.seen)
        return found


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def counted(found: Collected) -> list[str]:
    return [report.node for report in found.fresh]


def reasons(found: Collected) -> list[str]:
    return [one.reason for one in found.refused]


def test_a_good_status_counts(fleet: Fleet) -> None:
    fleet.put("a.json", fleet.one.status())
    assert counted(fleet.read()) == ["one"]


def test_a_status_that_another_known_node_signed_is_forged(fleet: Fleet) -> None:
    fleet.put("a.json", fleet.one.status(signer=fleet.other.key))
    found = fleet.read()
    assert (counted(found), reasons(found)) == ([], ["forged"])


def test_a_status_that_carries_the_key_it_is_signed_with_is_not_believed_for_that(fleet: Fleet) -> None:
    thief = Key("thief")
    fleet.put("a.json", fleet.one.status(signer=thief, key=thief.pem))
    assert reasons(fleet.read()) == ["forged"]


def test_a_status_of_a_node_that_nobody_enrolled_does_not_count(fleet: Fleet) -> None:
    fleet.put("a.json", Member("stranger").status())
    found = fleet.read()
    assert (counted(found), reasons(found)) == ([], ["unknown-node"])


@pytest.mark.parametrize("node", ["../keys/one", "one/../one", ".", "..", "one\n", "one.pub/", "o\u0000ne", ""])
def test_a_node_id_that_is_a_path_is_malformed(fleet: Fleet, node: str) -> None:
    payload = msgspec.to_builtins(fleet.one.report())
    payload["node"] = node
    fleet.put("a.json", envelope(statement.STATUS_TYPE, json.dumps(payload).encode(), [fleet.one.key]))
    assert reasons(fleet.read()) == ["malformed"]


def test_a_changed_payload_is_forged(fleet: Fleet) -> None:
    document = json.loads(fleet.one.status(FAILED))
    payload = base64.b64decode(document["payload"]).replace(b'"failed"', b'"active"')
    document["payload"] = base64.b64encode(payload).decode()
    fleet.put("a.json", json.dumps(document).encode())
    assert reasons(fleet.read()) == ["forged"]


def test_a_signature_over_a_snapshot_is_none_over_a_status(fleet: Fleet) -> None:
    payload = statement.encode(fleet.one.report())
    other = fleet.one.key.sign("application/vnd.reconciler.snapshot.v1+json", payload)
    fleet.put(
        "a.json",
        json.dumps({"payloadType": statement.STATUS_TYPE, "payload": base64.b64encode(payload).decode(), "signatures": [other]}).encode(),
    )
    fleet.put("b.json", envelope("application/vnd.reconciler.snapshot.v1+json", payload, [fleet.one.key]))
    assert reasons(fleet.read()) == ["forged", "malformed"]


def test_an_older_status_beside_a_newer_one_changes_nothing(fleet: Fleet) -> None:
    old, new = fleet.one.status(), fleet.one.status(FAILED)
    fleet.put("z.json", old)
    fleet.put("a.json", new)
    (report,) = fleet.read().fresh
    assert report.models == (FAILED,)


def test_an_older_status_in_the_place_of_the_newer_one_is_replayed(fleet: Fleet) -> None:
    old, new = fleet.one.status(), fleet.one.status(FAILED)
    fleet.put("one.json", new)
    assert counted(fleet.read()) == ["one"]
    fleet.put("one.json", old)
    found = fleet.read()
    assert (counted(found), reasons(found), found.missing) == ([], ["replayed"], ("one", "other"))


def test_without_the_record_of_what_was_seen_nothing_counts(fleet: Fleet) -> None:
    fleet.put("one.json", fleet.one.status())
    fleet.read()
    (fleet.keys / "seen.json").write_text("{")
    with pytest.raises(SettingsError, match=r"seen\.json"):
        fleet.read()


def test_two_different_statuses_with_one_number_are_both_refused(fleet: Fleet) -> None:
    fleet.put("a.json", fleet.one.status(sequence=9))
    fleet.put("b.json", fleet.one.status(FAILED, sequence=9))
    found = fleet.read()
    assert (counted(found), reasons(found)) == ([], ["two-faced"])
    assert "one" in found.missing


def test_another_status_under_a_number_that_was_seen_is_refused(fleet: Fleet) -> None:
    fleet.put("one.json", fleet.one.status(FAILED, sequence=9))
    fleet.read()
    fleet.put("one.json", fleet.one.status(sequence=9))
    assert (counted(fleet.read()), reasons(fleet.read())) == ([], ["two-faced"])


def test_a_copy_of_a_status_counts_once(fleet: Fleet) -> None:
    data = fleet.one.status()
    fleet.put("a.json", data)
    fleet.put("b.json", data)
    assert (counted(fleet.read()), reasons(fleet.read())) == (["one"], [])


def test_a_stale_status_is_of_a_silent_node(fleet: Fleet) -> None:
    fleet.put("a.json", fleet.one.status(at=NOW - timedelta(hours=4)))
    found = fleet.read()
    assert (counted(found), [report.node for report in found.silent]) == ([], ["one"])
    assert assess.assess(found, now=NOW).models[0].serving == 0


def test_a_status_from_the_future_does_not_count(fleet: Fleet) -> None:
    fleet.put("a.json", fleet.one.status(at=NOW + timedelta(minutes=6)))
    found = fleet.read()
    assert (counted(found), reasons(found)) == ([], ["from-the-future"])


def test_a_status_of_another_network_is_foreign(fleet: Fleet) -> None:
    fleet.put("a.json", fleet.one.status())
    fleet.put("b.json", fleet.other.status(network="mainnet"))
    with pytest.raises(UsageError, match="several networks"):
        fleet.read()
    found = fleet.read(network="testnet")
    assert (counted(found), reasons(found)) == (["one"], ["foreign"])


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"\xff", b"null", b'{"payloadType":1}', b" " * (statement.MAX_BYTES + 1), b"[" * 100_000,
        b'{"payloadType":"application/vnd.reconciler.status.v1+json","payload":"e30=","signatures":[]}',
        b'{"payloadType":"application/vnd.reconciler.status.v1+json","payload":"!","signatures":[{"keyid":"","sig":""}]}',
    ],
)  # fmt: skip
def test_a_bad_file_hides_no_good_one(fleet: Fleet, data: bytes) -> None:
    fleet.put("a.json", data)
    fleet.put("b.json", fleet.one.status())
    found = fleet.read()
    assert counted(found) == ["one"]
    assert len(found.refused) == 1


def test_a_link_and_a_pipe_are_not_read(fleet: Fleet) -> None:
    fleet.put("good", fleet.one.status())
    (fleet.statuses / "link.json").symlink_to("good")
    os.mkfifo(fleet.statuses / "pipe.json")
    found = fleet.read()
    assert (counted(found), len(found.refused)) == ([], 2)


def test_a_model_that_is_listed_twice_counts_for_nothing(fleet: Fleet) -> None:
    fleet.put("a.json", fleet.one.status(MODEL, MODEL))
    assert reasons(fleet.read()) == ["malformed"]


def test_enrolling_never_replaces_a_key(fleet: Fleet) -> None:
    thief = Key("thief")
    register = Register(fleet.keys)
    assert not register.enroll(statement.read(fleet.one.status(signer=thief, key=thief.pem)))
    assert (fleet.keys / "one.pub").read_text() == fleet.one.key.pem


def test_enrolling_takes_no_key_that_the_sender_does_not_hold(fleet: Fleet) -> None:
    stranger = Member("stranger")
    with pytest.raises(BadSignature):
        Register(fleet.keys).enroll(statement.read(stranger.status(signer=Key("thief"))))
    assert not (fleet.keys / "stranger.pub").exists()


def test_a_page_shows_hostile_texts_as_text(fleet: Fleet) -> None:
    evil = "<script>alert(1)</script>"
    fleet.put("a.json", fleet.one.status(ReportedModel(id=evil, state="failed", detail=f'"{evil}'), network=evil))
    html = page.render(assess.assess(fleet.read(), now=NOW)).decode()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


# -- safe to widen ---------------------------------------------------------------------------------------------


def judged(fleet: Fleet, *members: tuple[Member, ReportedModel], rule: assess.Rule) -> str:
    for member, model in members:
        enroll(fleet.keys, member)
        fleet.put(f"{member.name}.json", member.status(model))
    verdict = assess.assess(fleet.read(), now=NOW, rule=rule, judged=("a:v1",)).verdict
    assert verdict
    return verdict.word


def test_too_few_nodes_are_not_yet_safe(fleet: Fleet) -> None:
    assert judged(fleet, (fleet.one, MODEL), rule=assess.Rule(min_nodes=2)) == "not-yet"
    assert judged(fleet, (fleet.one, MODEL), (fleet.other, MODEL), rule=assess.Rule(min_nodes=2)) == "safe"


def test_nodes_that_serve_it_only_now_are_not_yet_enough(fleet: Fleet) -> None:
    fresh = msgspec.structs.replace(MODEL, since=NOW - timedelta(hours=1))
    assert judged(fleet, (fleet.one, fresh), rule=assess.Rule(after_seconds=7200)) == "not-yet"
    assert judged(fleet, (fleet.one, MODEL), rule=assess.Rule(after_seconds=7200)) == "safe"


def test_a_node_that_died_with_it_has_not_served_it_for_the_time_since(fleet: Fleet) -> None:
    """Found by the simulation: with a rule of two hours, and nodes stale after three, a model that ends the machine was safe."""
    last_words = msgspec.structs.replace(MODEL, since=NOW - timedelta(minutes=150))
    fleet.put("one.json", fleet.one.status(last_words, at=NOW - timedelta(minutes=149)))
    report = assess.assess(fleet.read(), now=NOW, rule=assess.Rule(after_seconds=7200), judged=("a:v1",))
    assert (report.models[0].serving, report.models[0].settled, report.models[0].unheard) == (1, 0, 1)
    assert report.verdict
    assert report.verdict.word == "not-yet"


def test_a_part_of_the_nodes_that_died_with_it_is_not_outvoted_by_the_rest(fleet: Fleet) -> None:
    last_words = msgspec.structs.replace(MODEL, since=NOW - timedelta(minutes=150))
    fleet.put("one.json", fleet.one.status(last_words, at=NOW - timedelta(minutes=149)))
    assert judged(fleet, (fleet.other, MODEL), rule=assess.Rule(after_seconds=7200)) == "not-yet"
    fleet.put("one.json", fleet.one.status(last_words))
    assert judged(fleet, rule=assess.Rule(after_seconds=7200)) == "safe"


def test_a_node_whose_time_is_not_over_is_no_reason_to_wait(fleet: Fleet) -> None:
    young = msgspec.structs.replace(MODEL, since=NOW - timedelta(minutes=60))
    assert judged(fleet, (fleet.one, young), (fleet.other, MODEL), rule=assess.Rule(after_seconds=7200)) == "safe"


def test_one_failure_in_two_is_more_than_one_in_a_hundred(fleet: Fleet) -> None:
    assert judged(fleet, (fleet.one, MODEL), (fleet.other, FAILED), rule=assess.Rule()) == "unsafe"


def test_a_node_that_rolled_back_counts_as_failed(fleet: Fleet) -> None:
    held = ReportedModel(id="a:v1", state="inactive", reason="held")
    assert judged(fleet, (fleet.one, MODEL), (fleet.other, held), rule=assess.Rule()) == "unsafe"


def test_a_model_that_ends_the_machine_is_not_safe(fleet: Fleet) -> None:
    fleet.put("other.json", fleet.other.status(ReportedModel(id="a:v1", state="pending", reason="not-tested"), at=NOW - timedelta(hours=4)))
    assert judged(fleet, (fleet.one, MODEL), rule=assess.Rule()) == "unsafe"


def test_nobody_who_counts_is_not_yet_safe(fleet: Fleet) -> None:
    fleet.put("a.json", Member("stranger").status())
    assert judged(fleet, rule=assess.Rule()) == "not-yet"


def test_two_contents_under_one_id_are_not_safe(fleet: Fleet) -> None:
    other = msgspec.structs.replace(MODEL, tree="sha256:" + "1" * 64)
    assert judged(fleet, (fleet.one, MODEL), (fleet.other, other), rule=assess.Rule(max_failed=1.0)) == "unsafe"
