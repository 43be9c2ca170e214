"""
What a node says when something is wrong: each situation is made for real, and what comes out is the table of the documentation.

``UPDATE=1 pytest tests/functional/test_failure_table.py`` writes the table.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from msgspec import Struct

from reconciler.commands import status as status_command
from reconciler.commands import status_page
from reconciler.commands.context import Clock, wall_clock
from reconciler.core.errors import ReconcileError
from reconciler.demo.server import Server
from reconciler.report import metrics
from tests import hostile_server as bad
from tests.adversary.test_sources_tls import Authority
from tests.hostile_server import HostileServer, honest
from tests.network import Network
from tests.node import Node, later, run, tiny

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "what-a-node-says.md"
PATH = "/snapshot.json"


class Stage(Struct):
    """A node that has fetched its snapshot once, and what a situation may turn against it."""

    node: Node
    network: HostileServer
    authority: Authority
    patch: pytest.MonkeyPatch
    stack: ExitStack
    clock: Clock = wall_clock

    def point_at(self, address: str, extra: str = "") -> None:
        text = f'[network]\nsnapshot = "{address}"\n\n[store]\nreserve = "1MiB"\n{extra}'
        (self.node.folder / "reconcile.toml").write_text(text)

    def publish(self, envelope: bytes) -> None:
        self.network.on(PATH, honest(envelope))

    def models(self) -> list[dict[str, object]]:
        return [self.node.item("a:v1", tiny("a"))]

    @property
    def now(self) -> datetime:
        return self.node.network.now


Situation = Callable[[Stage], None]


def a_name_that_does_not_resolve(on: Stage) -> None:
    def lost(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    on.patch.setattr(socket, "getaddrinfo", lost)
    on.point_at("https://config.example.org/snapshot.json")


def a_connection_that_is_refused(on: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    on.point_at(f"http://127.0.0.1:{port}{PATH}")


def a_certificate_for_another_name(on: Stage) -> None:
    server = on.stack.enter_context(HostileServer(tls=on.authority.server(host="other.example.org")))
    on.point_at(server.on(PATH, honest(b"{}")).replace("http://", "https://"), f'\n[download]\nca_file = "{on.authority.file}"\n')


def not_found_404(on: Stage) -> None:
    on.network.on(PATH, bad.status(404))


def a_login_page(on: Stage) -> None:
    on.network.on(PATH, bad.login_page)


def an_expired_snapshot(on: Stage) -> None:
    long_ago = on.now - timedelta(days=60)
    issued, expires = f"{long_ago:%Y-%m-%dT%H:%M:%SZ}", f"{long_ago + timedelta(days=30):%Y-%m-%dT%H:%M:%SZ}"
    on.publish(on.node.network.snapshot(*on.models(), issued_at=issued, expires_at=expires))


def an_older_snapshot_again(on: Stage) -> None:
    old = (on.node.folder / "published.json").read_bytes()
    on.publish(on.node.network.snapshot(*on.models()))
    assert on.node.run("sync").code == 0
    on.publish(old)


def another_networks_snapshot(on: Stage) -> None:
    other = Network("othernet")
    other.root_keys, other.snapshot_keys, other.now = on.node.network.root_keys, on.node.network.snapshot_keys, on.now
    on.publish(other.snapshot(*on.models()))


def an_expired_root(on: Stage) -> None:
    on.clock = lambda: datetime.now(UTC) + timedelta(days=400)


def a_clock_a_year_behind(on: Stage) -> None:
    on.clock = lambda: datetime.now(UTC) - timedelta(days=365)


def a_clock_a_year_ahead(on: Stage) -> None:
    on.clock = lambda: datetime.now(UTC) + timedelta(days=364)


def one_of_two_sources_dead(on: Stage) -> None:
    data = tiny("b")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    model = on.node.item("b:v1", data)
    model["artifacts"][0]["urls"].insert(0, f"http://127.0.0.1:{port}/b.gguf")
    on.publish(on.node.network.snapshot(*on.models(), model))


def no_source_answers(on: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    on.publish(on.node.network.snapshot(*on.models(), on.node.item("b:v1", tiny("b"), urls=[f"http://127.0.0.1:{port}/b.gguf"])))


def a_hook_that_is_missing(on: Stage) -> None:
    on.publish(on.node.network.snapshot(*on.models(), on.node.item("b:v1", tiny("b"))))
    on.point_at(on.network.url(PATH), '\n[hooks]\nhealthy = ["./not-there.sh"]\n')


HALF = "half of the sources are dead: one of a model's two"
SITUATIONS: dict[str, Situation] = {
    "all is well": lambda _: None,
    "a name that does not resolve, in a new address": a_name_that_does_not_resolve,
    "a connection that is refused, at a new address": a_connection_that_is_refused,
    "TLS with a certificate for another name, at a new address": a_certificate_for_another_name,
    "404 in place of the snapshot, after it was fetched before": not_found_404,
    "a login page in place of the snapshot": a_login_page,
    "an expired snapshot": an_expired_snapshot,
    "an older snapshot is published again": an_older_snapshot_again,
    "a snapshot of another network": another_networks_snapshot,
    "the trust root has expired": an_expired_root,
    "this machine's clock is a year behind": a_clock_a_year_behind,
    "this machine's clock is a year ahead": a_clock_a_year_ahead,
    HALF: one_of_two_sources_dead,
    "no source of a new model answers": no_source_answers,
    "the program of a hook is missing": a_hook_that_is_missing,
}


class Said(Struct):
    """What a node says in one situation."""

    code: int
    error: str
    summary: str
    level: str
    doctor: list[str]
    hints: list[str]
    refused: str
    metrics: list[str]


@contextmanager
def stage(tmp_path: Path, server: Server) -> Iterator[Stage]:
    node = Node(tmp_path / "node", server)
    node.publish(node.item("a:v1", tiny("a")))
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        network = stack.enter_context(HostileServer())
        on = Stage(node=node, network=network, authority=Authority(tmp_path), patch=patch, stack=stack)
        on.publish((node.folder / "published.json").read_bytes())
        on.point_at(network.url(PATH))
        assert node.run("sync").code == 0
        yield on


def observe(on: Stage) -> Said:
    """Run sync, status, doctor, metrics and the page, all at the clock of the situation, and after what was done to make it."""
    there = on.clock
    on.clock = lambda: there() + timedelta(seconds=5)
    passed = on.stack.enter_context(later(seconds=5))
    assert passed() > datetime.now(UTC)
    on.patch.setattr("reconciler.commands.context.wall_clock", on.clock)
    on.patch.setattr("reconciler.commands.context.from_settings.__kwdefaults__", {"clock": on.clock})
    node = on.node
    begun = on.clock() - timedelta(seconds=1)
    ran = node.run("sync", "--json")
    last = json.loads(ran.out.splitlines()[-1])
    error = f"{last['error']['name']}: {last['error']['message']}" if "error" in last else ""
    now = on.clock()
    context = node.context(lambda: now)
    try:
        summary = status_command.status(context).summary
    except ReconcileError as refused:
        summary = f"{refused.name}: {refused.message}"
    page = status_page.gather(context)
    assert summary in page.summary, "the page says what status says"
    found = run("doctor", "--json", "--config", str(node.folder / "reconcile.toml")).json
    bad_lines = [one for one in found["findings"] if one["level"] != "ok" and not one["name"].startswith(MACHINE)]
    figures = status_command.node_metrics(context)
    text = metrics.render(figures, on.clock()).decode()
    reason = re.search(r'reconcile_refused\{reason="([\w-]+)"\} 1', text)
    assert "reconcile_network_last_heard_timestamp_seconds" in text or "no snapshot was ever fetched" in summary.lower()
    return Said(
        code=ran.code,
        error=error,
        summary=summary,
        level=page.level,
        doctor=[f"{one['level']}: {one['name']}: {one['text']}" for one in bad_lines],
        hints=[one["hint"] for one in bad_lines] + ([last["error"]["hint"]] if "error" in last else []),
        refused=reason[1] if reason else "",
        metrics=_told(text, figures.heard_at, begun),
    )


def _told(text: str, heard_at: datetime | None, begun: datetime) -> list[str]:
    """Return what the metrics say beside a node on which all is well: an alert is made of each."""
    found = re.findall(r"^(reconcile_(?:refused|model_unfetched|model_held|model_failed)\S* 1)(?:\.0)?$", text, re.MULTILINE)
    found += re.findall(r'^(reconcile_models\{state="(?:failed|pending)"\} [1-9])(?:\d*\.0)?$', text, re.MULTILINE)
    heard = "reconcile_network_last_heard_timestamp_seconds"
    if heard_at is None:
        return [*(f"`{one}`" for one in found), f"no `{heard}`"]
    return [*(f"`{one}`" for one in found), *([f"`{heard}` stays at the last success"] if heard_at < begun else [])]


#: What depends on the machine that runs the test, and not on the situation.
MACHINE = ("sandbox", "gpu", "runtime", "python", "aria2c", "disk", "agent", "newer root")


def plain(text: str, on: Stage) -> str:
    """Return *text* without what differs from run to run: ports, times, folders."""
    text = text.replace(str(on.node.folder), "/etc/reconcile").replace("|", "\\|")
    text = re.sub(r"127\.0\.0\.1:\d+", "config.example.org", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "…", text)
    text = re.sub(r"\b\d+(\.\d+)?s\b", "0s", text)
    text = re.sub(r"\b\d+d \d+h", "…", text)
    return text.replace("<", "&lt;").replace("404 Whatever", "404 Not Found")


def row(name: str, said: Said, on: Stage) -> str:
    sync = f"exit {said.code}" + (f"<br>`{plain(said.error, on)}`" if said.error else "")
    doctor = "<br>".join(plain(line, on) for line in said.doctor) or "no error"
    told = "<br>".join(plain(one, on) for one in said.metrics) or "nothing more"
    return f"| {name} | {sync} | {said.level}: {plain(said.summary, on)} | {doctor} | {told} |"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Said, str]]:
    from reconciler.demo.server import serving

    found = {}
    with serving() as server:
        for number, (name, make) in enumerate(SITUATIONS.items()):
            with stage(tmp_path_factory.mktemp(f"situation{number}"), server) as on:
                make(on)
                said = observe(on)
                found[name] = said, row(name, said, on)
    return found


def test_the_table_of_the_documentation_is_what_a_node_says(table: dict[str, tuple[Said, str]]) -> None:
    head = "| situation | `sync` | `status` and the page | `doctor` | metrics |\n|---|---|---|---|---|\n"
    made = head + "\n".join(line for _, line in table.values()) + "\n"
    part = re.compile(r"(<!-- table:begin -->\n).*?(<!-- table:end -->)", re.DOTALL)
    expected = part.sub(lambda found: f"{found[1]}{made}{found[2]}", PAGE.read_text())
    if os.environ.get("UPDATE"):
        PAGE.write_text(expected)

    assert PAGE.read_text() == expected


@pytest.mark.parametrize("name", [name for name in SITUATIONS if name not in {"all is well", HALF}])
def test_no_situation_looks_healthy_anywhere(table: dict[str, tuple[Said, str]], name: str) -> None:
    said, _ = table[name]
    assert said.level != "ok"
    assert said.doctor or said.code
    assert said.metrics, "no alert can be made of it"
    assert not said.summary.startswith("All is well")


def test_every_situation_that_a_node_must_tell_of_is_in_the_table() -> None:
    told = " ".join(SITUATIONS)
    for word in (
        "does not resolve", "refused", "TLS", "404", "login page", "expired snapshot", "older snapshot", "another network",
        "root has expired", "a year behind", "a year ahead", "half of the sources", "hook",
    ):  # fmt: skip
        assert word in told


def test_what_is_well_looks_so(table: dict[str, tuple[Said, str]]) -> None:
    for name in ("all is well", HALF):
        said, _ = table[name]
        assert (said.code, said.level, said.refused) == (0, "ok", "")
        assert {line.partition(": ")[0] for line in said.doctor} == ({"warning"} if "dead" in name else set())


def test_every_command_that_a_hint_names_is_one(table: dict[str, tuple[Said, str]]) -> None:
    texts = [text for said, _ in table.values() for text in (*said.hints, said.summary)]
    named = {command for text in texts for command in re.findall(r"`reconcile ([^`]+)`", text)}
    assert len(named) > 3
    for command in named:
        words = [word for word in command.split() if word not in {"MODEL", "FILE", "b:v1"} and not word.startswith("-")]
        ran = subprocess.run([sys.executable, "-m", "reconciler", *words, "--help"], capture_output=True)
        assert ran.returncode == 0, command
