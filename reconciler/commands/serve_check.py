"""
What ``doctor`` says of the servers that follow the active set: who lags and why, and which of them can reach the network.

The network's rule is that models cannot reach the network while they serve. A server is looked at from outside: the process that listens
at its address, the interfaces and routes of that process, and what systemd denies its unit. Nothing is asked of the server itself.
"""

from __future__ import annotations

import ipaddress
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from reconciler.commands import serve
from reconciler.commands.context import NodeContext
from reconciler.core.state import ServerState
from reconciler.serve.content import Server
from reconciler.store import generations

_ANYWHERE = {"0.0.0.0/0", "::/0"}
_HINT = "start it as deploy/systemd/llama-server.service does: IPAddressDeny=any, and IPAddressAllow= for who may ask it"


class Finding(NamedTuple):
    """What was found of one server."""

    server: str
    level: Literal["ok", "warning"]
    text: str
    hint: str = ""


def findings(context: NodeContext) -> Iterator[tuple[str, Finding]]:
    """Yield what there is to say of each configured server, with what it is about."""
    active = generations.current_or_empty(context.layout).number
    yield from ((f"server {found.server}", found) for found in following(serve.states(context), active))
    yield from ((f"server {found.server} network", found) for found in network_access(context.servers))


def following(states: tuple[ServerState, ...], generation: int) -> Iterator[Finding]:
    """Yield for each server which generation it has, and why it lags."""
    for state in states:
        if state.error:
            hint = "look at the server's own log; `reconcile serve reload` tries again at once"
            yield Finding(state.name, "warning", f"has generation {state.generation}, active is {generation}: {state.error}", hint)
        elif state.generation != generation:
            hint = "`reconcile serve reload` reloads it now, and the next `reconcile apply` does too"
            yield Finding(state.name, "warning", f"has generation {state.generation}, active is {generation}: not reloaded yet", hint)
        else:
            yield Finding(state.name, "ok", f"has generation {generation}")


def network_access(servers: tuple[Server, ...]) -> Iterator[Finding]:
    """Yield for each server with an address on this machine whether the process there can reach the network."""
    for server in servers:
        address = server.reload if isinstance(server.reload, str) else server.options.get("metrics", "")
        port = _port_here(address) if isinstance(address, str) else None
        if port is None:
            continue
        process = _listener(port)
        if process is None:
            yield Finding(server.name, "ok", f"nothing that this user may see listens on port {port}: its network is not known")
        elif not _has_route(process):
            yield Finding(server.name, "ok", f"process {process} has no route to a network")
        elif unit := _denied_unit(process):
            yield Finding(server.name, "ok", f"process {process}: {unit} denies it every address but those that it allows")
        else:
            yield Finding(server.name, "warning", f"process {process} can reach the network, and models must not while they serve", _HINT)


def _port_here(url: str) -> int | None:
    """Return the port of *url* where its host is this machine's loopback; else None."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return None
    return (parts.port or (443 if parts.scheme == "https" else 80)) if is_here else None


def _listener(port: int) -> int | None:
    """Return the process that listens on *port*, or None where this user may not see it."""
    import psutil

    try:
        found = psutil.net_connections(kind="tcp")
    except psutil.Error:
        return None
    return next((one.pid for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid), None)


def _has_route(process: int) -> bool:
    """Return whether the network namespace of *process* has a route that leaves the machine; where that cannot be read, it may have one."""
    try:
        ipv4 = Path(f"/proc/{process}/net/route").read_text().splitlines()[1:]
        ipv6 = Path(f"/proc/{process}/net/ipv6_route").read_text().splitlines() if socket.has_ipv6 else []
    except OSError:
        return True
    return bool(ipv4) or any(line.split()[-1] != "lo" for line in ipv6)


def _denied_unit(process: int) -> str:
    """Return the systemd unit of *process* if it denies every address (``IPAddressDeny=any``), else an empty text."""
    try:
        lines = Path(f"/proc/{process}/cgroup").read_text().split()
    except OSError:
        return ""
    unit = next((part for line in lines for part in reversed(line.split("/")) if part.endswith(".service")), "")
    if not unit or shutil.which("systemctl") is None:
        return ""
    asked = ["systemctl", "show", "--property=IPAddressDeny", "--value", unit]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return unit if set(said.split()) >= _ANYWHERE else ""
