"""What a node does with a hostile network, a lost memory and a wrong clock; what serves goes on serving."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest

from reconciler.commands import apply, documents, node_trust
from reconciler.commands import status as status_command
from reconciler.commands.context import hold_store
from reconciler.core.errors import Expired, NotYetValid, TrustError, TrustStateLost
from reconciler.fetch import http
from tests import network as networks
from tests.node import Node, deaf, tiny, traces
from tests.node import run as command


def serves(node: Node) -> bool:
    return (node.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")


def test_rollback_by_lost_state_is_refused(used: Node) -> None:
    old = (used.folder / "published.json").read_bytes()
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    (used.store / "trust/floor.json").unlink()
    (used.store / "ledger.db").unlink()
    (used.folder / "published.json").write_bytes(old)

    for name in ("lock", "sync", "plan", "apply"):
        ran = used.run(name, "--json")
        assert ran.code == 4, (name, ran)
        assert json.loads(ran.out.splitlines()[-1])["error"]["name"] == "floor-lost"
        assert "trust init" in ran.err
    assert serves(used)
    assert used.run("status").code == 0


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": "x"}', b"\x00" * 100])
def test_one_damaged_copy_of_the_floor_is_enough(used: Node, damage: bytes) -> None:
    old = (used.folder / "published.json").read_bytes()
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    (used.store / "trust/floor.json").write_bytes(damage)
    (used.folder / "published.json").write_bytes(old)

    ran = used.run("lock", "--json")

    assert ran.code == 4
    assert ran.json["error"]["name"] == "rollback"
    assert used.run("apply").code == 0
    assert json.loads((used.store / "trust/floor.json").read_bytes())["version"] == 2


def test_a_lost_trust_state_starts_again_after_a_persons_consent(used: Node) -> None:
    (used.store / "trust/floor.json").unlink()
    (used.store / "ledger.db").unlink()

    ran = command("trust", "init", "--yes", "--config", str(used.folder / "reconcile.toml"))

    assert ran.code == 0, ran
    assert used.run("apply").code == 0
    assert serves(used)


def test_freeze_leaves_what_serves_and_installs_nothing(used: Node) -> None:
    later = used.network.now + timedelta(days=31)
    before = traces(used.store, ledger=False)

    with pytest.raises(Expired):
        apply.preview(used.context(lambda: later))
    with pytest.raises(Expired):
        apply.apply(used.context(lambda: later), deaf)
    with pytest.raises(Expired):
        apply.sync(used.context(lambda: later), deaf)

    status = status_command.status(used.context(lambda: later))
    assert status.refused is not None
    assert status.refused.startswith("expired: ")
    assert [model.state for model in status.models] == ["active"]
    assert serves(used)
    after = traces(used.store, ledger=False)
    before.pop("."), after.pop(".")
    assert after == before
    kinds = [incident.kind for incident in status_command.incidents(used.context())]
    assert kinds.count("expired") == 2  # once from each place; the same again is counted


def test_expiry_is_refused_at_the_very_instant(used: Node) -> None:
    end = used.network.now + timedelta(days=30)
    with pytest.raises(Expired):
        apply.preview(used.context(lambda: end))
    assert not apply.preview(used.context(lambda: end - timedelta(seconds=1))).plan.changes


def test_an_older_snapshot_from_the_network_fails_a_check_and_is_recorded(used: Node) -> None:
    older = (used.folder / "published.json").read_bytes()
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    lock = (used.folder / "models.lock").read_bytes()
    (used.folder / "published.json").write_bytes(older)

    assert used.run("lock", "--check").code == 4
    assert used.run("lock").code == 4

    assert "rollback" in [incident.kind for incident in status_command.incidents(used.context())]
    assert (used.folder / "models.lock").read_bytes() == lock


def test_a_clock_before_the_accepted_snapshot_is_refused(used: Node) -> None:
    earlier = used.network.now - timedelta(hours=1)
    with pytest.raises(NotYetValid, match="the clock is behind"):
        apply.preview(used.context(lambda: earlier))
    assert serves(used)


def test_an_address_that_never_answered_is_an_error_and_the_last_lock_is_applied(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    text = (node.folder / "reconcile.toml").read_text()
    (node.folder / "reconcile.toml").write_text(text.replace('"published.json"', '"http://127.0.0.1:9/snapshot.json"'))

    ran = node.run("sync")

    assert ran.code == 1, ran
    assert "no snapshot could be fetched" in ran.out
    assert "the lock that was accepted last stays in use" in ran.out
    assert serves(node)
    assert node.run("lock").code == 1


def test_removing_more_than_half_is_said_loudly(node: Node) -> None:
    items = [node.item(f"{name}:v1", tiny(name)) for name in "abc"]
    node.publish(*items)
    assert node.run("apply").code == 0
    node.publish(items[0])

    planned = node.run("plan")
    assert node.run("apply").code == 0

    assert "this removes 2 of 3 active models" in planned.out
    details = [one["detail"] for one in node.run("incidents", "--json").json]
    assert "this removes 2 of 3 active models" in details
    node.publish(*items)
    assert node.run("plan", "--json").json["summary"]["download_bytes"] == 0


def test_a_lock_swapped_between_plan_and_apply_is_refused(used: Node, tmp_path: Path) -> None:
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    saved = tmp_path / "plan.json"
    assert used.run("plan", "--out", str(saved)).code == 0
    used.publish(used.item("a:v1", tiny("a")), used.item("c:v1", tiny("c")))

    ran = used.run("apply", str(saved))

    assert ran.code == 1
    assert "error[stale-plan]" in ran.err
    assert used.states() == {"a:v1": "active", "c:v1": "absent"}


def test_a_tampered_active_blob_is_found_and_healed(used: Node) -> None:
    path = next(path for path in (used.store / "blobs").rglob("*") if path.is_file())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)

    found = used.run("verify", "--json")
    assert found.code == 3
    assert used.run("plan", "--json").json["models"][0]["op"] in {"repair", "retest"}
    healed = used.run("verify", "--repair")

    assert healed.code == 0, healed
    assert serves(used)
    assert "blob-damaged" in {one["kind"] for one in used.run("incidents", "--json").json}


def test_a_server_cannot_forge_a_line_in_the_log(node: Node) -> None:
    from reconciler.core.events import Incident
    from reconciler.report.events import sentence

    node.publish(node.item("a:v1", tiny("a")))
    evil = Incident(kind="source-failed", source="https://x/\x1b[2Jy", detail="404\nincident fine: \x1b[31mall is well\r")
    with hold_store(node.context()) as ledger:
        ledger.log_incident(evil, node.network.now)

    shown = node.run("incidents").out

    assert "\x1b" not in shown
    assert not [line for line in shown.splitlines() if line.startswith("incident fine")]
    assert "\x1b" not in sentence(evil)
    assert "\n" not in sentence(evil)


def test_roots_are_walked_on_sync_and_a_crash_between_is_a_resume(used: Node) -> None:
    roots = used.folder / "roots"
    roots.mkdir()
    (roots / "2.json").write_bytes(used.network.rotate(snapshot_keys=networks.keys("second", 2)))
    (roots / "3.json").write_bytes(used.network.rotate(root_keys=networks.keys("third", 2)))
    text = (used.folder / "reconcile.toml").read_text()
    template = f'root_updates = "{roots}/{{version}}.json"\n'
    (used.folder / "reconcile.toml").write_text(text.replace("[network]\n", f"[network]\n{template}"))
    with hold_store(used.context()) as ledger:
        node_trust.apply_roots(used.context(), (str(roots / "2.json"),), ledger)  # and then the power goes

    used.network.now += timedelta(seconds=1)
    (used.folder / "published.json").write_bytes(used.network.snapshot(used.item("a:v1", tiny("a"))))
    assert used.run("sync").code == 0

    shown = command("trust", "show", "--json", "--config", str(used.folder / "reconcile.toml")).json
    assert shown["version"] == 3
    assert shown["roles"]["snapshot"]["keyids"] == [key.id for key in networks.keys("second", 2)]
    assert serves(used)


def test_a_relative_place_of_newer_roots_is_relative_to_the_settings(used: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (used.folder / "2.json").write_bytes(used.network.rotate())
    text = (used.folder / "reconcile.toml").read_text()
    (used.folder / "reconcile.toml").write_text(text.replace("[network]\n", '[network]\nroot_updates = "{version}.json"\n'))
    monkeypatch.chdir(tmp_path)

    assert used.run("sync").code == 0
    assert node_trust.trusted_root(used.context()).version == 2


@pytest.mark.parametrize("version", [1, 2])
def test_a_server_that_gives_one_root_under_every_number_is_asked_no_more_than_once_too_often(
    used: Node, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    rotated = used.network.rotate()
    root = {1: (used.folder / "root.json").read_bytes(), 2: rotated}[version]
    text = (used.folder / "reconcile.toml").read_text()
    (used.folder / "reconcile.toml").write_text(text.replace("[network]\n", '[network]\nroot_updates = "{version}.json"\n'))
    asked: list[str] = []

    def fetch(source: str, *_: object, **__: object) -> http.Document:
        asked.append(Path(source).name)
        return http.Document(data=root)

    monkeypatch.setattr(documents, "fetch", fetch)
    with hold_store(used.context()) as ledger:
        assert node_trust.fetch_newer_roots(used.context(), ledger, node_trust.trusted_root(used.context())).version == version
    assert asked == ["2.json", "3.json"][:version]


def test_a_root_that_skips_or_is_not_signed_by_the_old_one_is_refused(used: Node, tmp_path: Path) -> None:
    used.network.rotate()
    skipping = tmp_path / "3.json"
    skipping.write_bytes(used.network.rotate())
    refused = command("trust", "update", str(skipping), "--config", str(used.folder / "reconcile.toml"))
    assert refused.code == 4
    assert "error[bad-root-chain]" in refused.err
    alone = tmp_path / "2.json"
    other = networks.Network()
    other.root_keys = networks.keys("thief", 2)
    other.root_version = 2
    alone.write_bytes(other.root())
    refused = command("trust", "update", str(alone), "--config", str(used.folder / "reconcile.toml"))
    assert refused.code == 4
    assert serves(used)


class _Tagged(BaseHTTPRequestHandler):
    """Serves one document with an ETag, and counts what it sends."""

    document = b""
    sent: list[int] = []  # noqa: RUF012  one server a test

    def do_GET(self) -> None:
        fresh = self.headers.get("If-None-Match") == '"one"'
        self.sent.append(304 if fresh else 200)
        self.send_response(self.sent[-1])
        self.send_header("ETag", '"one"')
        body = b"" if fresh else self.document
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def tagged() -> Iterator[type[_Tagged]]:
    handler = type("Handler", (_Tagged,), {"sent": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    handler.address = f"http://127.0.0.1:{server.server_address[1]}/snapshot.json"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_unchanged_snapshot_is_not_sent_twice(node: Node, tagged: type[_Tagged]) -> None:
    tagged.document = node.network.snapshot(node.item("a:v1", tiny("a")))
    text = (node.folder / "reconcile.toml").read_text()
    address = tagged.address  # type: ignore[attr-defined]
    (node.folder / "reconcile.toml").write_text(text.replace('"published.json"', f'"{address}"'))

    assert node.run("sync").code == 0
    assert node.run("sync").code == 0
    (node.folder / "snapshot.json").unlink()
    assert node.run("sync").code == 0

    assert tagged.sent == [200, 304, 200]

    (node.folder / "snapshot.json").write_bytes(b"{}")
    assert node.run("sync").code == 0
    assert tagged.sent[3:] == [200]


def test_a_snapshot_that_never_ends_is_cut_off(node: Node, tagged: type[_Tagged]) -> None:
    tagged.document = b" " * (17 << 20)
    text = (node.folder / "reconcile.toml").read_text()
    address = tagged.address  # type: ignore[attr-defined]
    (node.folder / "reconcile.toml").write_text(text.replace('"published.json"', f'"{address}"'))

    ran = node.run("lock", "--json")

    assert ran.code == 4
    assert ran.json["error"]["name"] == "too-large"


def test_nothing_switches_the_checks_off(used: Node) -> None:
    import re

    from reconciler.cli import cli

    words = re.compile(r"insecure|no-verify|skip-(check|verify|sign)|allow-unsigned|trust-all|force-trust", re.IGNORECASE)
    context = click.Context(cli)
    commands = [command for name in cli.list_commands(context) if (command := cli.get_command(context, name))]
    names = [option for command in commands for parameter in command.params for option in parameter.opts]
    assert names
    assert not [name for name in names if words.search(name)]
    used.configure("insecure = true\n")
    assert used.run("plan").code == 1


def test_floor_lost_is_a_trust_error() -> None:
    assert issubclass(TrustStateLost, TrustError)


def test_a_clock_that_stays_behind_is_one_incident_however_often_it_is_asked(used: Node) -> None:
    minutes = iter(range(100))
    context = used.context(lambda: datetime.fromtimestamp(60 * next(minutes), UTC))
    for _ in range(3):
        with pytest.raises(NotYetValid):
            apply.sync(context, deaf)
    logged = [one for one in status_command.incidents(used.context()) if one.kind == "not-yet-valid"]
    assert [one.times for one in logged] == [3]
