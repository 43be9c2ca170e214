"""What lies in ``deploy/`` and in the operator's manual: parsed by the tools that will read it, and compared with the program."""

from __future__ import annotations

import configparser
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import click
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from reconciler import settings_file
from reconciler.cli import cli
from reconciler.commands import status
from reconciler.core import errors
from reconciler.fetch.swarm_daemon import CALLER
from reconciler.report import metrics
from tests.unit.test_metrics import FULL

TOP = Path(__file__).parents[2]
DEPLOY = TOP / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("reconcile*.[st][ei][rm]*"))
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
#: Those that talk to peers, and run no test job.
PEERS = [unit for unit in SERVICES if unit.stem in {"reconcile-swarm", "reconcile-seeder"}]
NODES = [unit for unit in SERVICES if unit not in PEERS]
MANUAL = (TOP / "docs" / "how-to" / "monitor.md").read_text()


def parsed(words: list[str]) -> click.Context:
    """Return the context in which click would run this command line: every value is checked, nothing runs."""
    command: click.Command = cli
    context = click.Context(cli, info_name="reconcile")
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(context, name)
        assert found is not None, f"there is no command {name!r}"
        context, command = click.Context(found, info_name=name, parent=context), found
    return command.make_context(context.info_name, words)


# -- systemd


class Unit(configparser.RawConfigParser):
    """A unit file; of a key that stands twice, the last one."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
        self.read_string(path.read_text())

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def command_of(unit: Unit) -> list[str]:
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert program == "/opt/reconcile/bin/reconcile"
    return words


def test_there_are_the_units_that_the_manual_names() -> None:
    names = ["reconcile-agent.service", "reconcile-seeder.service", "reconcile-swarm.service", "reconcile.service", "reconcile.timer"]
    assert [unit.name for unit in UNITS] == names


@pytest.fixture
def installed(tmp_path: Path) -> list[Path]:
    """The units as systemd would find them, on a machine where the program is this one."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed: systemd-analyze is missing, the units are parsed only")
    program = tmp_path / "reconcile"
    program.write_text(f"#!{sys.executable}\n")
    program.chmod(0o755)
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/reconcile/bin/reconcile", str(program)))
    return [tmp_path / unit.name for unit in UNITS]


def test_systemd_finds_no_fault_in_the_units(installed: list[Path]) -> None:
    ran = subprocess.run(["systemd-analyze", "verify", "--man=no", *installed], capture_output=True, text=True)

    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("name", [unit.name for unit in SERVICES])
def test_systemd_calls_the_services_well_confined(installed: list[Path], name: str) -> None:
    path = next(path for path in installed if path.name == name)
    ran = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=40", path], capture_output=True, text=True)

    assert ran.returncode == 0, ran.stdout.splitlines()[-1]


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_the_sandbox_keeps_what_it_needs(path: Path) -> None:
    service = Unit(path)["Service"]
    taken_away = {
        "RestrictNamespaces", "MemoryDenyWriteExecute", "PrivateUsers", "PrivateDevices", "ProtectProc", "ProcSubset", "ProtectHostname",
        "ProtectKernelTunables", "ProtectKernelLogs", "PrivateNetwork", "DynamicUser",
    }  # fmt: skip

    assert not taken_away & set(service)
    assert set(service["RestrictAddressFamilies"].split()) == {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"}
    assert service["NoNewPrivileges"] == "yes"
    assert service["CapabilityBoundingSet"] == ""
    assert service["ProtectSystem"] == "strict"
    assert service["User"] == "reconcile"
    assert service["OOMPolicy"] == "continue"


@pytest.mark.parametrize("path", PEERS, ids=lambda path: path.name)
def test_what_talks_to_peers_is_another_user_that_writes_to_its_own_folder_alone(path: Path) -> None:
    service = Unit(path)["Service"]

    assert service["User"] == path.stem != "reconcile"
    assert service["StateDirectory"] == path.stem
    assert service["ProtectSystem"] == "strict"
    assert service["BindPaths"] == f"/var/lib/{path.stem}"
    assert "/var" in service["TemporaryFileSystem"]
    assert service["CapabilityBoundingSet"] == ""
    assert service["RestrictNamespaces"] == service["PrivateDevices"] == service["NoNewPrivileges"] == "yes"


@pytest.mark.parametrize("path", PEERS, ids=lambda path: path.name)
def test_what_talks_to_peers_reaches_neither_this_machine_nor_private_networks(path: Path) -> None:
    text = path.read_text()
    words = {key: re.findall(rf"^{key}=(.*)$", text, re.MULTILINE) for key in ("IPAddressDeny", "IPAddressAllow")}
    denied = {word for line in words["IPAddressDeny"] for word in line.split()}
    allowed = {word for line in words["IPAddressAllow"] for word in line.split()}

    assert {"localhost", "link-local", "multicast", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"} <= denied
    assert allowed == ({CALLER} if path.stem == "reconcile-swarm" else set()) | {"127.0.0.53"}


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_a_node_may_delete_what_it_took_from_the_swarms_folder(path: Path) -> None:
    """All else is read-only for it, and what arrives would fill the disk."""
    assert Unit(path)["Service"]["ReadWritePaths"] == "-/var/lib/reconcile-swarm"
    assert "m reconcile reconcile-swarm" in (DEPLOY / "systemd" / "reconcile-swarm.sysusers").read_text()


def test_both_services_are_confined_alike() -> None:
    def confinement(path: Path) -> str:
        return path.read_text().partition("# Who it is")[2].partition("\n[Install]")[0].strip()

    first, second = (confinement(path) for path in NODES)
    assert first == second != ""


def syscalls(groups: list[str]) -> set[str]:
    """Return the system calls in systemd's *groups*, with those of the groups inside them."""
    text = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True).stdout
    known: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("@"):
            known[current := line.strip()] = []
        elif line.startswith("    ") and "#" not in line:
            known[current].append(line.strip())
    found, left = set(), list(groups)
    while left:
        name = left.pop()
        if name.startswith("@"):
            left += known[name]
        else:
            found.add(name)
    return found


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_the_system_calls_of_the_sandbox_are_let_through(path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed: systemd-analyze is missing, its groups of system calls are not known")
    allowed = syscalls(Unit(path)["Service"]["SystemCallFilter"].split())

    assert {"unshare", "clone", "mount", "umount2", "pivot_root", "sethostname", "prctl", "flock", "fsync", "renameat2"} <= allowed
    assert {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"} <= allowed
    assert not {"reboot", "kexec_load", "init_module", "bpf", "swapon", "ptrace", "open_by_handle_at"} & allowed


@pytest.mark.parametrize("mounts", ["", "ProtectControlGroups PrivateTmp"])
def test_bubblewrap_works_under_what_the_units_mount(mounts: str) -> None:
    """The same mounts, made by hand, since a unit cannot be started here; with those of the two that are left out, it fails."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: bwrap is missing")
    made = "mount --bind /sys/fs/cgroup /sys/fs/cgroup && mount -o remount,bind,ro /sys/fs/cgroup && mount -t tmpfs none /tmp && "
    assert sandboxed(made if mounts else "") == 0


def test_what_the_units_leave_out_would_break_bubblewrap() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: bwrap is missing")
    assert sandboxed("mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && ") != 0
    assert sandboxed("mount --bind /dev/null /proc/kmsg && ") != 0


def sandboxed(before: str) -> int:
    """Run bubblewrap without rights, in a mount namespace where *before* was done; return its exit code."""
    drop = "setpriv --reuid 65534 --regid 65534 --clear-groups --bounding-set=-all --no-new-privs"
    wrap = "bwrap --unshare-all --unshare-user --hostname sandbox --ro-bind / / --proc /proc --dev /dev -- /bin/true"
    ran = subprocess.run(["unshare", "--mount", "sh", "-c", f"{before}exec {drop} {wrap}"], capture_output=True, text=True)
    if "unshare failed" in ran.stderr:
        pytest.skip("mount namespaces may not be made here: needs root")
    return ran.returncode


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_the_services_run_a_command_that_exists(path: Path) -> None:
    context = parsed(command_of(Unit(path)))

    assert context.info_name == "agent"
    assert context.params["once"] == (Unit(path)["Service"]["Type"] == "oneshot")


def test_the_service_unit_takes_the_agents_notifications() -> None:
    service = Unit(DEPLOY / "systemd" / "reconcile-agent.service")["Service"]

    assert (service["Type"], service["NotifyAccess"], service["KillMode"]) == ("notify", "main", "mixed")
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert service["RestartPreventExitStatus"] == str(errors.UsageError.exit_code)
    assert int(service["WatchdogSec"]) >= 30


def test_the_timers_service_takes_a_busy_store_for_success_and_its_time_for_downloads() -> None:
    service = Unit(DEPLOY / "systemd" / "reconcile.service")["Service"]

    assert service["SuccessExitStatus"] == str(errors.StoreBusy.exit_code)
    assert service["TimeoutStartSec"] == "infinity"
    folder = Path(str(parsed(command_of(Unit(DEPLOY / "systemd" / "reconcile.service"))).params["metrics_file"])).parent
    assert folder.relative_to("/var/lib").as_posix() in service["StateDirectory"].split()


# -- the unit of a server that follows the active set

LLAMA = DEPLOY / "systemd" / "llama-server.service"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The unit as systemd would find it, on a machine where the server is a program."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed: systemd-analyze is missing, the unit is parsed only")
    path = tmp_path / LLAMA.name
    path.write_text(LLAMA.read_text().replace("/opt/llama/bin/llama-server", sys.executable))
    return path


def test_systemd_finds_no_fault_in_the_unit_of_a_server(llama: Path) -> None:
    ran = subprocess.run(["systemd-analyze", "verify", "--man=no", llama], capture_output=True, text=True)

    assert (ran.returncode, ran.stderr) == (0, "")


def test_systemd_calls_the_server_better_confined_than_the_agent(llama: Path) -> None:
    ran = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=20", llama], capture_output=True, text=True)

    assert ran.returncode == 0, ran.stdout.splitlines()[-1]


def test_the_server_sees_the_store_read_only_and_no_network_but_the_loopback() -> None:
    service = Unit(LLAMA)["Service"]

    assert (service["IPAddressDeny"], service["IPAddressAllow"]) == ("any", "localhost")
    assert set(service["RestrictAddressFamilies"].split()) == {"AF_UNIX", "AF_INET", "AF_INET6"}
    assert (service["ProtectSystem"], service["BindReadOnlyPaths"], service["ProtectHome"]) == ("strict", "/var/lib/reconcile", "yes")
    assert not {"ReadWritePaths", "StateDirectory", "BindPaths"} & set(service)
    assert service["User"] == "llama-server"
    assert f"u {service['User']} " in (DEPLOY / "systemd" / "llama-server.sysusers").read_text()
    assert (service["DevicePolicy"], service["NoNewPrivileges"], service["CapabilityBoundingSet"]) == ("closed", "yes", "")


def test_the_table_beside_the_unit_fits_it() -> None:
    lines = [line[4:] for line in LLAMA.read_text().splitlines() if line.startswith("#   ") and ("=" in line or "[[" in line)]
    (table,) = settings_file.decode("\n".join(lines).encode(), Path("/etc/reconcile")).serve
    words = shlex.split(Unit(LLAMA)["Service"]["ExecStart"])
    given = dict(itertools.pairwise(words))

    assert given["--models-preset"] == table.path == Unit(LLAMA)["Unit"]["ConditionPathExists"]
    assert table.reload == f"http://{given['--host']}:{given['--port']}/models?reload=1"
    assert "--offline" in words
    assert "--model" not in words, "that would start it for one model alone"


# -- cron


def jobs() -> Iterator[tuple[list[str], str, str]]:
    for line in (DEPLOY / "cron.d" / "reconcile").read_text().splitlines():
        if line and not line.startswith("#") and not re.match(r"[A-Z_]+=", line):
            *when, user, command = line.split(None, 6)
            yield when, user, command


def test_the_lines_for_cron_are_lines_for_cron() -> None:
    found = list(jobs())

    assert len(found) == 2
    for when, user, command in found:
        for field, most in zip(when, (59, 23, 31, 12, 7), strict=True):
            assert re.fullmatch(r"\*|\*/\d+|\d+", field)
            assert all(int(number) <= most for number in re.findall(r"\d+", field))
        assert user == "reconcile"
        assert "%" not in command, "cron reads a new line there"
    assert (DEPLOY / "cron.d" / "reconcile").read_text().endswith("\n"), "cron passes over a last line without an end"


def test_cron_runs_commands_that_exist() -> None:
    run = [parsed(shlex.split(command.partition(" 2>&1 ")[0])[1:]) for _, _, command in jobs()]

    assert [context.info_name for context in run] == ["sync", "verify"]
    assert all(context.params["quiet"] for context in run)
    assert run[1].params["sample"] * 30 >= 1, "every blob within a month"


# -- the container


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Containerfile").read_text())
    lines = [line.strip() for line in text.splitlines()]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line and not line.startswith("#"))]


def test_the_container_is_made_of_what_is_here() -> None:
    for word, rest in instructions():
        assert word in {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "USER", "VOLUME", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (TOP / source).exists(), source
        if word == "FROM":
            assert re.fullmatch(r"python:3\.\d+[a-z0-9.-]*( AS [a-z]+)?", rest), "a version, and no registry's host"


def test_the_container_gets_all_that_a_wheel_is_made_of() -> None:
    wheel = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}

    assert {*wheel["packages"], *wheel["force-include"]} <= copied


def test_the_container_runs_without_rights_a_command_that_exists() -> None:
    last = dict(instructions())  # of each instruction the last one counts

    assert last["USER"] == "65532:65532"
    assert json.loads(last["ENTRYPOINT"]) == ["reconcile"]
    assert parsed(json.loads(last["CMD"])).info_name == "agent"
    assert parsed(json.loads(last["HEALTHCHECK"].partition(" CMD ")[2])[1:]).info_name == "doctor"
    assert last["STOPSIGNAL"] == "SIGTERM"


# -- metrics


def exported() -> dict[str, set[str]]:
    """Return every name that can be exported, with its labels."""
    text = metrics.render(FULL, datetime.now(UTC)).decode()
    return {sample.name: set(sample.labels) for family in text_string_to_metric_families(text) for sample in family.samples}


def dashboard() -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((DEPLOY / "grafana" / "reconcile.json").read_bytes()))


def rules() -> list[dict[str, Any]]:
    tree = yaml.safe_load((DEPLOY / "prometheus" / "reconcile.rules.yml").read_text())
    return [rule for group in tree["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    shown = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [*shown, *(rule["expr"] for rule in rules()), dashboard()["templating"]["list"][1]["definition"]]


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_that_is_asked_for_is_exported(expression: str) -> None:
    names = exported()
    asked = re.findall(r"\breconcile_\w+", expression)

    assert asked
    for name in asked:
        assert name in names
    for name, selector in re.findall(r"\b(reconcile_\w+)\{([^}]*)\}", expression):
        labels = set(re.findall(r"(\w+)\s*(?:=~|=|!=|!~)", re.sub(r'"[^"]*"', '""', selector)))
        assert labels <= names[name] | {"instance"}, (name, labels)
    assert expression.count("(") == expression.count(")")


def test_every_value_that_is_asked_for_can_occur() -> None:
    can = {"state": set(metrics.STATES), "kind": set(status.INCIDENT_KINDS)}
    for expression in expressions():
        for label, values in re.findall(r'\b(state|kind)=~?"([^"]*)"', expression):
            assert set(values.split("|")) <= can[label], expression


def test_every_kind_of_incident_that_the_program_names_is_counted_from_zero() -> None:
    text = "\n".join(path.read_text() for path in (TOP / "reconciler").rglob("*.py"))
    named = set(re.findall(r'Incident\(\s*kind="([a-z-]+)"', text)) | {error.name for error in errors.TrustError.__subclasses__()}

    assert named <= set(status.INCIDENT_KINDS)
    assert len(set(status.INCIDENT_KINDS)) == len(status.INCIDENT_KINDS)


def test_the_dashboard_is_one() -> None:
    panels = dashboard()["panels"]

    assert len({panel["id"] for panel in panels}) == len(panels) >= 20
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"


def test_every_alert_says_what_happened_and_stands_in_the_manual() -> None:
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["alert"] in MANUAL
    assert len({rule["alert"] for rule in rules()}) == len(rules())
