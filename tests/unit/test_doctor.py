"""The doctor: what each check says of a healthy node and of a sick one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from reconciler.agent.service import write_health
from reconciler.commands import doctor
from reconciler.commands.context import NodeContext, from_settings
from reconciler.commands.doctor import CheckInput, CheckResult
from reconciler.commands.status import Health, health_path
from reconciler.core.errors import SettingsError
from reconciler.core.trust import TrustState
from reconciler.fetch import reachability
from reconciler.fetch.connection import Endpoint, endpoint_of
from reconciler.settings import Settings
from reconciler.settings_file import decode
from reconciler.store import trust_state
from reconciler.store.ledger import Ledger
from tests.network import NOW, Network
from tests.node import run


@pytest.fixture
def network() -> Network:
    return Network()


def given(settings: Settings, now: datetime = NOW) -> CheckInput:
    return CheckInput(node=from_settings(settings, clock=lambda: now), now=now)


def with_settings(case: CheckInput, text: str) -> CheckInput:
    return given(decode(text.encode(), case.node.folder))


@pytest.fixture
def case(tmp_path: Path, network: Network) -> CheckInput:
    (tmp_path / "root.json").write_bytes(network.root())
    (tmp_path / "published.json").write_bytes(network.snapshot(network.model("a:v1")))
    return given(decode(b'[network]\nsnapshot = "published.json"\n[store]\nreserve = "1MiB"\n', tmp_path))


@pytest.fixture
def locked(case: CheckInput) -> CheckInput:
    from reconciler.commands import lock

    fetched = lock.preview_lock(case.node)
    case.node.envelope_path.write_bytes(fetched.envelope)
    case.node.lock_path.write_bytes(fetched.data)
    return msgspec.structs.replace(case)  # one that has not looked at the lock yet


def levels(check: doctor.Check, case: CheckInput) -> list[str]:
    return [finding.level for finding in doctor.run_check(check, case)]


def one(check: doctor.Check, case: CheckInput) -> CheckResult:
    (found,) = doctor.run_check(check, case)
    return found


# -- the doctor


def test_a_check_that_breaks_ends_no_other(case: CheckInput) -> None:
    def broken_one(_: CheckInput) -> Iterator[CheckResult]:
        yield CheckResult(name="before", level="ok", text="")
        raise ZeroDivisionError("division by zero")

    before, after = doctor.run_check(broken_one, case)

    assert before.name == "before"
    assert (after.name, after.level) == ("broken one", "error")
    assert "ZeroDivisionError" in after.text


def test_settings_that_do_not_hold_leave_the_machine_examined() -> None:
    def load() -> NodeContext:
        raise SettingsError("reconcile.toml: unknown key 'stor'", hint="did you mean 'store'?")

    found = doctor.examine(load, offline=True)

    assert (found[0].name, found[0].level, found[0].hint) == ("settings", "error", "did you mean 'store'?")
    assert {"python", "aria2c", "sandbox"} <= {finding.name for finding in found}


def test_every_finding_of_a_sick_node_says_what_to_do(case: CheckInput) -> None:
    found = doctor.examine(lambda: case.node, offline=True)

    assert all(finding.text for finding in found)
    assert all(finding.hint for finding in found if finding.level != "ok"), found
    assert "lock" in {finding.name for finding in found if finding.level == "error"}


def test_the_exit_code_and_the_json_say_whether_there_is_an_error(case: CheckInput) -> None:
    config = case.node.folder / "reconcile.toml"
    config.write_text('[network]\nsnapshot = "published.json"\n')
    sick = run("doctor", "--offline", "--json", "--config", str(config))

    assert sick.code == 1
    assert sick.json["ok"] is False
    assert {"name", "level", "text", "hint"} == set(sick.json["findings"][0])
    assert "error    lock: lock-mismatch" in run("doctor", "--offline", "--config", str(config)).out


def test_the_doctor_leaves_no_trace(locked: CheckInput) -> None:
    folder = locked.node.folder
    before = sorted(folder.rglob("*"))
    doctor.examine(lambda: locked.node, offline=True)

    assert sorted(folder.rglob("*")) == before


# -- the machine


def test_aria2c_is_found_and_runs(case: CheckInput) -> None:
    found = one(doctor.aria2c, case)

    assert found.level == "ok"
    assert found.text[0].isdigit()


def test_an_aria2c_that_does_not_run_is_an_error(case: CheckInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reconciler.fetch import aria2_daemon

    broken = tmp_path / "aria2c"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(aria2_daemon, "find", lambda: broken)

    assert levels(doctor.aria2c, case) == ["error"]


@pytest.mark.parametrize(
    ("setting", "works", "expected"),
    [
        ("auto", (True, True), ["ok", "ok", "ok"]),
        ("auto", (False, True), ["warning", "ok", "ok"]),
        ("auto", (False, False), ["error", "error", "error"]),
        ("bubblewrap", (False, True), ["error", "ok", "error"]),
        ("landlock", (False, True), ["ok", "ok", "ok"]),
    ],
)
def test_only_a_sandbox_that_holds_counts(
    case: CheckInput, monkeypatch: pytest.MonkeyPatch, setting: str, works: tuple[bool, bool], expected: list[str]
) -> None:
    from reconciler.sandbox import choose

    probed = (
        choose.ProbeResult(mode="bubblewrap", works=works[0], detail="what it saw"),
        choose.ProbeResult(mode="landlock", works=works[1], detail="what it saw"),
    )
    monkeypatch.setattr(choose, "probe_all", lambda: probed)

    assert levels(doctor.sandbox, with_settings(case, f'[smoke]\nsandbox = "{setting}"\n')) == expected


def test_the_real_sandbox_is_probed(case: CheckInput) -> None:
    assert [finding.name for finding in doctor.run_check(doctor.sandbox, case)] == ["sandbox bubblewrap", "sandbox landlock", "sandbox"]


def test_a_missing_engine_matters_only_where_a_model_needs_it(locked: CheckInput, monkeypatch: pytest.MonkeyPatch) -> None:
    from reconciler.runtime import engines

    monkeypatch.setattr(engines, "installed", lambda _: {})
    found = {finding.name: finding for finding in doctor.run_check(doctor.runtimes, locked)}

    assert found["runtime llama-cpp"].level == "error"
    assert "llama-cpp-python" in found["runtime llama-cpp"].hint
    assert all(finding.level == "ok" for name, finding in found.items() if name != "runtime llama-cpp")


# -- the node


@pytest.mark.parametrize(("days", "expected"), [(-1, "error"), (0, "error"), (29, "warning"), (31, "ok")])
def test_a_root_that_expires_soon_is_reported_in_time(tmp_path: Path, network: Network, days: int, expected: str) -> None:
    (tmp_path / "root.json").write_bytes(network.root())
    now = NOW + timedelta(days=365 - days)

    assert one(doctor.trust_root, given(Settings(base=str(tmp_path)), now)).level == expected


def test_a_node_without_a_root_gets_a_hint_how_to_pin_one(tmp_path: Path) -> None:
    found = one(doctor.trust_root, given(Settings(base=str(tmp_path))))

    assert found.level == "error"
    assert "put it there" in found.hint


@pytest.mark.parametrize(("days", "expected"), [(0, "ok"), (26, "ok"), (28, "warning"), (30, "error")])
def test_a_lock_is_judged_by_its_time(locked: CheckInput, days: int, expected: str) -> None:
    assert one(doctor.lock, msgspec.structs.replace(locked, now=NOW + timedelta(days=days))).level == expected


def test_an_edited_lock_is_an_error(locked: CheckInput) -> None:
    path = locked.node.lock_path
    path.write_bytes(path.read_bytes().replace(b"version = 1", b"version = 2"))

    assert one(doctor.lock, locked).text.startswith("lock-mismatch")


def test_a_clock_before_the_accepted_snapshot_is_an_error(case: CheckInput) -> None:
    layout = case.node.layout
    layout.root.mkdir()
    with Ledger.writing(layout.ledger) as ledger:
        trust_state.write(layout, ledger, TrustState(version=1, digest="sha256:" + "0" * 64, issued_at=NOW + timedelta(days=1)))
    os.utime(layout.ledger, (NOW.timestamp(), NOW.timestamp()))

    assert one(doctor.clock, case).level == "error"
    assert one(doctor.clock, msgspec.structs.replace(case, now=NOW + timedelta(days=1))).level == "ok"


def test_files_from_the_future_are_a_warning(case: CheckInput) -> None:
    path = case.node.lock_path
    path.write_bytes(b"")
    os.utime(path, (NOW.timestamp() + 3600, NOW.timestamp() + 3600))

    assert one(doctor.clock, case).level == "warning"


def test_a_disk_within_the_reserve_is_an_error(case: CheckInput) -> None:
    assert one(doctor.disk, with_settings(case, '[store]\nreserve = "900PiB"\n')).level == "error"


def test_a_damaged_ledger_is_a_warning_with_what_it_costs(case: CheckInput) -> None:
    layout = case.node.layout
    layout.root.mkdir()
    with Ledger.writing(layout.ledger) as ledger:
        ledger.set_fact("x", 1)
    assert one(doctor.ledger, case).level == "ok"
    layout.ledger.write_bytes(b"garbage" * 1000)

    found = one(doctor.ledger, case)
    assert found.level == "warning"
    assert "nothing is downloaded" in found.hint


def test_an_active_link_that_leads_nowhere_is_an_error(case: CheckInput) -> None:
    layout = case.node.layout
    layout.root.mkdir()
    layout.active.symlink_to("generations/7")

    assert one(doctor.active, case).level == "error"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "ok"),
        ({"failures": 3, "outcome": "error", "message": "no disk"}, "warning"),
        ({"next_at": NOW - timedelta(hours=1)}, "warning"),
        ({"next_at": NOW + timedelta(hours=1)}, "ok"),
    ],
)
def test_an_agent_that_fails_or_is_overdue_is_a_warning(case: CheckInput, changes: dict[str, object], expected: str) -> None:
    health = Health(phase="waiting", outcome="done", started_at=NOW, ended_at=NOW)
    write_health(case.node.layout, msgspec.structs.replace(health, **changes))

    assert health_path(case.node.layout).exists()
    assert one(doctor.agent, case).level == expected


# -- reach


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def shut() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port: int = closed.getsockname()[1]
    return port


def sources(case: CheckInput, snapshot: str, fallback: str) -> CheckInput:
    text = f'[network]\nsnapshot = {json.dumps(snapshot)}\n[download]\nfallback = ["{fallback}/{{algorithm}}/{{hex}}"]\n'
    return with_settings(case, text)


def test_a_snapshot_out_of_reach_is_an_error_and_a_mirror_a_warning(case: CheckInput, listener: socket.socket, shut: int) -> None:
    port = listener.getsockname()[1]
    up, down = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{shut}"

    assert levels(doctor.reachable, sources(case, f"{up}/s.json", down)) == ["ok", "warning"]
    assert levels(doctor.reachable, sources(case, f"{down}/s.json", up)) == ["error", "ok"]
    assert levels(doctor.reachable, sources(case, f"{up}/s.json", up)) == ["ok"], "each host once"


def test_offline_touches_no_network(case: CheckInput, shut: int) -> None:
    looked = msgspec.structs.replace(sources(case, f"http://127.0.0.1:{shut}/s.json", f"http://127.0.0.1:{shut}"), offline=True)

    assert levels(doctor.reachable, looked) == ["ok"]


def test_behind_a_proxy_only_the_proxy_is_connected_to(case: CheckInput, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    text = f'[network]\nsnapshot = "https://config.example.org/s.json"\n[download]\nproxy = "http://127.0.0.1:{port}"\n'

    assert one(doctor.reachable, with_settings(case, text)).name == f"network 127.0.0.1:{port}"


def test_a_host_that_speaks_no_tls_does_not_answer(case: CheckInput, listener: socket.socket) -> None:
    host = Endpoint(host="127.0.0.1", port=listener.getsockname()[1], tls=True)
    (answer,) = reachability.check_reachable([host], None, 0.3)

    assert answer.error


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "https://", "ftp://x/", "https://x:99999/", "models/{hex}", "http://[::1"])
def test_what_is_no_http_url_has_no_host(url: str) -> None:
    assert endpoint_of(url) is None


def test_ports_follow_the_scheme() -> None:
    assert str(endpoint_of("https://models.example.org/x")) == "models.example.org:443"
    assert str(endpoint_of("http://[::1]/x")) == "[::1]:80"


def test_a_name_that_is_none_is_an_answer_too(case: CheckInput) -> None:
    (answer,) = reachability.check_reachable([Endpoint(host="x" * 64 + ".invalid", port=80, tls=False)], None, 1.0)

    assert answer.error
