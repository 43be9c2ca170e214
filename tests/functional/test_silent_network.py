"""A network that is silent or refused: what the node keeps of it, how it says so, and with what its commands end."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from reconciler.commands import apply, doctor, fetch_record
from reconciler.commands import status as status_command
from reconciler.commands.context import Clock, wall_clock
from reconciler.core.errors import FetchError, NetworkSilent, ReconcileError, TrustError
from reconciler.store import clock as clocks
from reconciler.store.ledger import Ledger
from tests import hostile_server as bad
from tests.hostile_server import HostileServer, honest
from tests.node import Node, deaf, later, run, tiny

PATH = "/snapshot.json"
UNSIGNED = json.dumps({"payloadType": "application/vnd.reconciler.snapshot.v1+json", "payload": "e30=", "signatures": []}).encode()


@pytest.fixture
def network() -> Iterator[HostileServer]:
    with HostileServer() as made:
        yield made


@pytest.fixture
def online(used: Node, network: HostileServer) -> Node:
    """A node that serves one model and fetched its snapshot from *network*."""
    network.on(PATH, honest((used.folder / "published.json").read_bytes()))
    point_at(used, network.url(PATH))
    assert used.run("sync").code == 0
    return used


def point_at(node: Node, address: str, extra: str = "") -> None:
    text = f'[network]\nsnapshot = "{address}"\n{extra}\n[store]\nreserve = "1MiB"\n'
    (node.folder / "reconcile.toml").write_text(text)


def status(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = node.run("status", "--json").json
    return found


def sync_error(node: Node, clock: Clock = wall_clock) -> ReconcileError | None:
    try:
        apply.sync(node.context(clock), deaf)
    except ReconcileError as error:
        return error
    return None


def heard(node: Node) -> fetch_record.FetchStatus:
    context = node.context()
    with Ledger.reading(context.layout.ledger) as ledger:
        return fetch_record.read(context, ledger)


def check(node: Node, clock: Clock = wall_clock) -> doctor.CheckResult:
    context = node.context(clock)
    (found,) = doctor.snapshot(doctor.CheckInput(node=context, now=clock()))
    return found


def failing(node: Node, network: HostileServer, clock: Clock = wall_clock) -> ReconcileError | None:
    network.on(PATH, bad.status(503))
    return sync_error(node, clock)


# -- what is kept and shown


def test_a_snapshot_that_is_fetched_is_recorded_even_if_it_is_unchanged(online: Node) -> None:
    first = heard(online).last
    assert first is not None
    with later(hours=1) as clock:
        assert sync_error(online, clock) is None

    again = heard(online).last
    assert again is not None
    assert again - first >= timedelta(minutes=59)
    assert status(online)["heard"]["refused"] is None
    assert status(online)["heard"]["unreachable"] is None


def test_lock_records_its_attempt_as_sync_does(online: Node, network: HostileServer) -> None:
    network.on(PATH, bad.status(404))

    assert online.run("lock").code == 1
    assert "404" in status(online)["heard"]["unreachable"]["cause"]


def test_another_source_on_the_command_line_is_no_word_of_the_network(online: Node, network: HostileServer) -> None:
    network.on("/other.json", bad.status(404))
    before = heard(online)

    assert run("lock", network.url("/other.json"), "--config", str(online.folder / "reconcile.toml")).code == 1
    assert heard(online) == before


def test_a_node_that_refuses_every_snapshot_does_not_look_healthy(online: Node, network: HostileServer) -> None:
    network.on(PATH, honest(UNSIGNED))

    assert online.run("sync").code == 4

    found = status(online)
    refused = found["heard"]["refused"]
    assert set(refused) == {"at", "name", "message", "since"}
    assert refused["name"] == "bad-signature"
    assert found["refused"].startswith("bad-signature: ")
    assert "has been refused for" in found["summary"]
    assert "bad-signature" in found["summary"]
    assert online.run("status").out.startswith(f"{found['summary'][:60]}")
    assert check(online).level == "error"
    assert check(online).hint
    assert "warning: the snapshot at the configured address has been refused" in online.run("plan").out
    metrics = status_command.node_metrics(online.context())
    assert metrics.network is not None
    assert metrics.network.refused == "bad-signature"
    assert metrics.heard_at == heard(online).last


def test_a_root_that_does_not_follow_is_recorded_as_a_refusal(online: Node, network: HostileServer) -> None:
    root = (online.folder / "root.json").read_bytes()
    network.on("/2.json", honest(root.replace(b'"signatures"', b'"signatures_"', 1)))
    point_at(online, network.url(PATH), f'root_updates = "{network.url("/{version}.json")}"')

    assert online.run("sync").code == 4
    assert status(online)["heard"]["refused"] is not None


def test_a_refusal_lasts_until_a_snapshot_is_accepted(online: Node, network: HostileServer) -> None:
    """A network that is out of reach in between must not make it look new, or gone."""
    good = honest((online.folder / "published.json").read_bytes())
    network.on(PATH, honest(UNSIGNED))
    assert isinstance(sync_error(online), TrustError)
    since = heard(online).refused
    assert since is not None
    with later(hours=1) as clock:
        assert failing(online, network, clock) is None
    network.on(PATH, honest(UNSIGNED))
    with later(hours=2) as clock:
        assert isinstance(sync_error(online, clock), TrustError)

    again = heard(online)
    assert again.refused is not None
    assert again.refused.since == since.since
    assert again.refused.at - since.at > timedelta(hours=1)
    assert again.unreachable is None, "it answered"
    network.on(PATH, good)
    assert online.run("sync").code == 0
    assert heard(online).refused is None


def test_nothing_of_a_secret_in_the_address_is_kept(online: Node, network: HostileServer) -> None:
    point_at(online, network.url(f"{PATH}?token=hidden"))
    network.on(PATH, honest(UNSIGNED))
    assert online.run("sync").code == 4
    network.on(PATH, bad.status(503))
    assert online.run("sync").code == 1

    assert "hidden" not in json.dumps(status(online))
    assert "hidden" not in str(online.run("incidents", "--json").json)


def test_what_a_server_says_is_kept_in_part_alone(online: Node, network: HostileServer) -> None:
    network.on(PATH, honest(b'{"payload": "e30=", "' + b"x" * 100_000 + b'": 1}'))
    online.run("sync")
    refused = heard(online).refused
    assert refused is not None
    assert len(refused.message) < 1_000


def test_status_doctor_and_plan_leave_no_record(online: Node, network: HostileServer) -> None:
    network.on(PATH, bad.status(503))
    before = heard(online)
    for command in ("status", "plan", "doctor"):
        online.run(command)
    checked(online)
    assert heard(online) == before


# -- exit codes of sync


def test_an_address_that_never_answered_is_an_error_at_once(used: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    point_at(used, f"http://127.0.0.1:{port}{PATH}")

    ran = used.run("sync", "--json")

    assert ran.code == 1
    error = ran.events[-1]["error"]
    assert error["name"] == "source-failed"
    assert "Connection refused" in error["message"]
    assert "no snapshot was ever fetched from this address" in error["message"]
    assert used.active() == ["a:v1"]
    assert "No snapshot was ever fetched" in status(used)["summary"]
    assert check(used).level == "error"


@pytest.mark.parametrize(
    ("behaviour", "cause"), [(bad.status(404), "404"), (bad.login_page, "a web page"), (bad.garbage, ""), (bad.status(503), "503")]
)
def test_each_cause_of_a_first_failure_is_named(used: Node, network: HostileServer, behaviour: bad.Behaviour, cause: str) -> None:
    point_at(used, network.on(PATH, behaviour))
    ran = used.run("sync")
    assert ran.code == 1
    assert cause in ran.err
    assert cause in status(used)["heard"]["unreachable"]["cause"]


def test_a_name_that_leads_nowhere_is_an_error_at_once(used: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lost)
    point_at(used, "https://config.example.org/snapshot.json")
    ran = used.run("sync")
    assert ran.code == 1
    assert "Name or service not known" in ran.err


def test_a_server_that_speaks_no_tls_is_an_error_at_once(used: Node) -> None:
    point_at(used, used.server.address.replace("http://", "https://") + PATH)
    assert used.run("sync").code == 1


def test_a_short_silence_is_a_warning(online: Node, network: HostileServer) -> None:
    network.on(PATH, bad.status(503))

    ran = online.run("sync")

    assert ran.code == 0
    assert "no snapshot could be fetched" in ran.out
    assert "No snapshot could be fetched for" in status(online)["summary"]
    assert check(online).level == "warning"


def test_a_long_silence_is_exit_code_6_and_everything_else_is_done(online: Node, network: HostileServer) -> None:
    assert failing(online, network) is None
    (online.store / "active").unlink()
    with later(hours=25) as clock:
        error = sync_error(online, clock)
        assert check(online, clock).level == "error"

    assert isinstance(error, NetworkSilent)
    assert (error.name, error.exit_code) == ("network-silent", 6)
    assert "503" in error.message
    assert online.active() == ["a:v1"]


def test_a_model_that_failed_says_more_than_a_silence(online: Node, network: HostileServer) -> None:
    assert failing(online, network) is None
    network.on(PATH, honest(online.network.snapshot(online.item("a:v1", tiny("a")), online.item("b:v1", b"no model"))))
    assert sync_error(online) is None
    assert failing(online, network) is None
    with later(hours=25) as clock:
        assert apply.sync(online.context(clock), deaf).failed == ("b:v1",)


@pytest.mark.parametrize(("quiet_after", "code"), [("24h", 0), ("0s", 6)])
def test_the_settings_say_how_long_a_silence_may_be(online: Node, network: HostileServer, quiet_after: str, code: int) -> None:
    point_at(online, network.url(PATH), f'quiet_after = "{quiet_after}"')
    assert failing(online, network) is None or code == 6
    with later(minutes=1) as clock:
        error = sync_error(online, clock)
    assert (error.exit_code if error else 0) == code


def test_a_changed_address_counts_as_never_fetched(online: Node, network: HostileServer) -> None:
    point_at(online, network.on("/moved.json", bad.status(404)))
    assert heard(online).last is None, "before anybody asks there, too"
    assert online.run("sync").code == 1
    assert status(online)["heard"]["last"] is None
    network.on("/moved.json", honest((online.folder / "published.json").read_bytes()))
    assert online.run("sync").code == 0
    network.on("/moved.json", bad.status(404))
    assert online.run("sync").code == 0


def test_without_a_lock_a_silence_is_an_error_however_long(online: Node, network: HostileServer) -> None:
    assert failing(online, network) is None
    (online.folder / "models.lock").unlink()
    with later(hours=25) as clock:
        error = sync_error(online, clock)
    assert isinstance(error, FetchError)
    assert error.exit_code == 1


def test_a_path_that_cannot_be_read_is_an_error_and_is_recorded(used: Node) -> None:
    (used.folder / "published.json").unlink()
    assert used.run("sync").code == 1
    assert "cannot be read" in status(used)["heard"]["unreachable"]["cause"]


def test_a_sync_that_asks_nobody_is_no_silence(online: Node, network: HostileServer) -> None:
    assert failing(online, network) is None
    with later(hours=25):
        assert online.run("sync", "--offline").code == 0
        assert online.run("sync", "--locked").code == 0


# -- the clock


def test_a_clock_that_is_set_forward_makes_no_silence(online: Node, network: HostileServer) -> None:
    assert failing(online, network) is None
    assert failing(online, network, lambda: datetime.now(UTC) + timedelta(days=3)) is None


def test_a_clock_that_was_ahead_ends_no_silence(online: Node, network: HostileServer) -> None:
    assert failing(online, network, lambda: datetime.now(UTC) + timedelta(days=3)) is None
    assert failing(online, network) is None
    found = heard(online)
    assert found.unreachable is not None
    assert found.last is not None
    assert found.unreachable.since <= datetime.now(UTC)
    assert found.last <= datetime.now(UTC)
    with later(hours=25) as clock:
        assert isinstance(failing(online, network, clock), NetworkSilent)


def test_a_clock_of_a_new_boot_is_not_believed_at_once(online: Node, network: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failing(online, network) is None
    monkeypatch.setattr(clocks, "boot_time", lambda: clocks.BootTime("another", 10.0))
    assert failing(online, network, lambda: datetime.now(UTC) + timedelta(days=3)) is None


def test_times_from_the_future_count_as_now(online: Node, network: HostileServer) -> None:
    ahead = datetime.now(UTC) + timedelta(days=3)
    assert failing(online, network, lambda: ahead) is None
    found = status(online)
    assert "for 0.0s" in found["summary"]
    assert check(online).level == "warning"


# -- the summary


def test_status_opens_with_one_sentence(online: Node) -> None:
    summary = status(online)["summary"]
    assert summary.startswith("All is well, with 1 model active, as snapshot 1 asks; last fetched at ")
    assert online.run("status").out.startswith("All is well, with 1 model active")


def test_what_is_still_to_be_done_is_named_with_how(online: Node) -> None:
    (online.folder / "next.json").write_bytes(online.network.snapshot(online.item("a:v1", tiny("a")), online.item("b:v1", tiny("b"))))
    assert run("lock", str(online.folder / "next.json"), "--config", str(online.folder / "reconcile.toml")).code == 0
    assert "is not done yet for 1 model (b:v1): run `reconcile apply`" in status(online)["summary"]


def test_a_rollback_that_holds_is_named_with_what_ends_it(online: Node, network: HostileServer) -> None:
    network.on(PATH, honest(online.network.snapshot(online.item("a:v1", tiny("a")), online.item("b:v1", tiny("b")))))
    assert online.run("sync").code == 0
    assert online.run("rollback").code == 0
    assert "for 1 model (b:v1): `reconcile resume` ends that" in status(online)["summary"]


def test_a_failed_model_is_named_with_how_to_see_why(node: Node) -> None:
    node.publish(node.item("a:v1", b"no model at all"))
    assert node.run("apply").code == 3
    assert status(node)["summary"].startswith("Failed, not fetched or not tested yet: 1 model (a:v1); ")
    assert "`reconcile status a:v1` shows why" in status(node)["summary"]


def test_an_expired_lock_is_the_first_thing_said(online: Node, network: HostileServer) -> None:
    end = online.network.now + timedelta(days=31)
    assert failing(online, network) is None
    summary = status_command.status(online.context(lambda: end)).summary
    assert summary.startswith("Nothing new is installed, because the lock is refused (expired: ")
    assert "no snapshot could be fetched for" in summary


# -- the agent


def test_the_agent_calls_a_long_silence_by_its_name(online: Node, network: HostileServer) -> None:
    point_at(online, network.url(PATH), 'quiet_after = "0s"')
    network.on(PATH, bad.status(503))

    ran = online.run("agent", "--once", "--json")

    assert ran.code == 6
    assert ran.events[-1]["error"]["name"] == "network-silent"
    health = json.loads((online.store / "health.json").read_bytes())
    assert health["outcome"] == "silent"
    assert health["failures"] == 1


# -- lock --check


def checked(node: Node, *arguments: str) -> Any:
    return run("lock", "--check", *arguments, "--config", str(node.folder / "reconcile.toml"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.replace(b"max_tokens = 4", b"max_tokens = 5"),
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: b"edited",
        lambda data: b"",
        lambda data: data + b"\n",
    ],
    ids=["edited", "crlf", "no lock at all", "empty", "newline"],
)
def test_a_lock_that_differs_is_2(used: Node, damage: Any) -> None:
    path = used.folder / "models.lock"
    path.write_bytes(damage(path.read_bytes()))
    ran = checked(used)
    assert ran.code == 2
    assert ran.out.startswith("models.lock would change: models.lock is not ")
    assert checked(used, "--json").json["changes"] is True


def test_a_lock_of_another_snapshot_is_2(used: Node) -> None:
    (used.folder / "published.json").write_bytes(used.network.snapshot(used.item("b:v1", tiny("b"))))
    ran = checked(used)
    assert ran.code == 2
    assert "which has version 2" in ran.out


def test_a_lock_that_is_the_snapshots_is_0(used: Node) -> None:
    ran = checked(used)
    assert (ran.code, ran.out) == (0, "models.lock is up to date\n")
    assert checked(used, "--json").json == {"changes": False, "difference": ""}


@pytest.mark.parametrize("name", ["models.lock", "snapshot.json", "published.json"])
def test_where_there_is_nothing_to_check_it_is_1(used: Node, name: str) -> None:
    (used.folder / name).unlink()
    ran = checked(used)
    assert ran.code == 1
    assert name in ran.err
    assert "hint: " in ran.err


def test_an_empty_folder_is_1_and_says_how_to_begin(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("lock", "--check")
    assert ran.code == 1
    assert ran.err.startswith("error[nothing-to-check]: there is nothing to check: there is no lock yet: ")
    assert "`reconcile init` writes one" in ran.err


@pytest.mark.parametrize("name", ["snapshot.json", "published.json"])
def test_only_what_is_refused_is_4(used: Node, name: str) -> None:
    (used.folder / name).write_bytes(UNSIGNED)
    assert checked(used).code == 4


def test_a_network_that_does_not_answer_a_check_is_1(online: Node, network: HostileServer) -> None:
    network.on(PATH, bad.status(503))
    assert checked(online).code == 1
