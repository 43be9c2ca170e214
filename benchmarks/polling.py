"""
What a sync that finds nothing new costs the origin: requests, bytes and processor time, with real syncs against a real nginx over TLS.

    unshare --net sh -c 'ip link set lo up; python -m benchmarks.polling'            # alone on its network, so that bytes can be counted
    python -m benchmarks.polling --syncs 200 --before ../another-version             # and another version's sources

Every sync is a process of its own (``python -m reconciler sync``) in a node with a store of its own, with the addresses that
``reconcile init`` writes. Bytes are those of nginx's log: requests and answers with their headers. What TLS and TCP add is seen on the
loopback device, where nobody else uses it. Ends with 1 where the budget is not met: one request a sync, newer roots aside, under 1 kB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msgspec import Struct

from benchmarks.listening import wait_until_it_listens
from reconciler.core import units
from reconciler.settings import Agent

HERE = Path(__file__).resolve().parents[1]
BUDGET_BYTES = 1000
FLEET = 10_000
_MAKE = "import sys; from pathlib import Path; from benchmarks import stores; stores.full(Path(sys.argv[1]), int(sys.argv[2]))"


class Request(Struct, frozen=True):
    """A line of nginx's log."""

    connection: int
    path: str
    status: int
    received: int
    sent: int


class Origin:
    """nginx that serves *folder* over TLS at *address*."""

    def __init__(self, folder: Path, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.home = folder, home
        self.address = f"https://127.0.0.1:{port}"
        self.certificate = home / "certificate.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-subj", "/CN=origin", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(home / "key.pem"),
             "-out", str(self.certificate)],
            check=True, capture_output=True,
        )  # fmt: skip
        temporary = " ".join(f"{kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = "user root;" if os.geteuid() == 0 else ""
        (home / "nginx.conf").write_text(
            f"{user} worker_processes 1; daemon off; pid {home}/pid; error_log {home}/error.log;"
            f"events {{ worker_connections 512; }}"
            f"http {{ {temporary} types {{ application/json json; }} gzip on; gzip_types application/json;"
            f"log_format line '$connection $request_uri $status $request_length $bytes_sent'; access_log {home}/access.log line;"
            f"server {{ listen 127.0.0.1:{port} ssl; root {folder}; ssl_certificate {self.certificate};"
            f"ssl_certificate_key {home}/key.pem; }} }}"
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run it."""
        process = subprocess.Popen(["/usr/sbin/nginx", "-c", str(self.home / "nginx.conf"), "-e", str(self.home / "error.log")])
        try:
            wait_until_it_listens(self.address.removeprefix("https://"), self.home / "error.log")
            self._workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield
        finally:
            process.terminate()
            process.wait()

    def processor_seconds(self) -> float:
        """Return how long its worker has been on a processor."""
        return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in self._workers) / 1e9

    def requests(self) -> list[Request]:
        """Return what it was asked so far."""
        found = [line.split(" ") for line in (self.home / "access.log").read_text().splitlines()]
        return [Request(int(it[0]), it[1], int(it[2]), int(it[3]), int(it[4])) for it in found]


class Node:
    """One node in *folder*, of the version in *tree*, that hears its snapshot from *origin*."""

    def __init__(self, folder: Path, tree: Path, origin: Origin, models: int) -> None:
        self.folder, self.tree = folder, tree
        self._run("-c", _MAKE, str(folder), str(models))
        published = origin.folder / folder.name
        published.mkdir(parents=True)
        (published / "snapshot.json").write_bytes((folder / "published.json").read_bytes())
        (folder / "reconcile.toml").write_text(
            f'[network]\nsnapshot = "{origin.address}/{folder.name}/snapshot.json"\n'
            f'root_updates = "{origin.address}/{folder.name}/{{version}}.root.json"\n\n[download]\nca_file = "{origin.certificate}"\n'
        )

    def sync(self) -> float:
        """Sync in a process of its own; return its seconds."""
        began = time.perf_counter()
        self._run("-m", "reconciler", "sync", "--quiet", "--config", str(self.folder / "reconcile.toml"))
        return time.perf_counter() - began

    def _run(self, *words: str) -> None:
        ran = subprocess.run(
            [sys.executable, *words], cwd=self.tree, env=os.environ | {"PYTHONPATH": str(self.tree)}, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, (words, ran.stdout, ran.stderr)


class Cost(Struct, frozen=True, kw_only=True):
    """What the syncs of one version cost, each."""

    name: str
    syncs: int
    requests: float
    roots: int
    connections: float
    received: float
    sent: float
    largest: int
    wire: float
    processor_ms: float
    seconds: float

    @property
    def bytes(self) -> float:
        """Bytes beyond TLS."""
        return self.received + self.sent


def measured(name: str, nodes: list[Node], origin: Origin, syncs: int, at_once: int) -> Cost:
    """Let *nodes* sync *syncs* times in all, *at_once* at a time, and return what that cost *origin*."""
    before, busy, wire = len(origin.requests()), origin.processor_seconds(), _on_loopback()
    with ThreadPoolExecutor(at_once) as pool:
        # A node syncs one time after the other: each thread has nodes of its own.
        mine = [nodes[index::at_once] for index in range(at_once)]
        shares = [syncs // at_once + (index < syncs % at_once) for index in range(at_once)]
        seconds = [one for found in pool.map(_syncs, mine, shares) for one in found]
    busy, wire = origin.processor_seconds() - busy, _on_loopback() - wire
    asked = origin.requests()[before:]
    roots = [one for one in asked if one.path.endswith(".root.json")]
    return Cost(
        name=name, syncs=syncs, requests=len(asked) / syncs, roots=len(roots), connections=len({one.connection for one in asked}) / syncs,
        received=sum(one.received for one in asked) / syncs, sent=sum(one.sent for one in asked) / syncs,
        largest=max(one.received + one.sent for one in asked), wire=wire / syncs, processor_ms=1000 * busy / syncs,
        seconds=statistics.median(seconds),
    )  # fmt: skip


def _syncs(nodes: list[Node], count: int) -> list[float]:
    return [nodes[number % len(nodes)].sync() for number in range(count)]


def _on_loopback() -> int:
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[0])


def _is_alone() -> bool:
    return all(line.strip().startswith("lo:") for line in Path("/proc/net/dev").read_text().splitlines()[2:])


def shown(cost: Cost) -> str:
    """Return *cost* as a row of RESULTS.md."""
    wire = f"{cost.wire:,.0f}" if _is_alone() else "–"
    return (
        f"| {cost.name}, {cost.syncs:,} syncs | {cost.requests:.3f} | {cost.connections:.3f} | {cost.received:,.0f} + {cost.sent:,.0f} "
        f"| {wire} | {cost.processor_ms:.2f} ms |"
    )


def of_fleet(cost: Cost) -> str:
    """Return what 10,000 such nodes cost an origin, as a row of RESULTS.md."""
    syncs = FLEET / (units.seconds(Agent().interval) + units.seconds(Agent().jitter) / 2)
    wire = f"{cost.wire * syncs * 86400 / 1e9:,.1f} GB" if _is_alone() else "–"
    return (
        f"| {cost.name} | {cost.requests * syncs:.0f} | {cost.bytes * syncs * 86400 / 1e9:.2f} GB | {wire} "
        f"| {100 * cost.processor_ms / 1000 * syncs:.0f} % |"
    )


def main() -> int:
    """Measure, and print rows for RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--syncs", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--before-syncs", type=int, default=200)
    parser.add_argument("--before", type=Path, help="sources of another version, measured after this one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="polling-") as scratch:
        home = Path(scratch)
        (home / "www").mkdir()
        origin = Origin(home / "www", home)
        versions = {"now": HERE} | ({"before": asked.before.resolve()} if asked.before else {})
        with origin.running():
            fleets = {}
            for name, tree in versions.items():
                fleets[name] = [Node(home / f"{name}-{number}", tree, origin, asked.models) for number in range(asked.nodes)]
                for node in fleets[name]:
                    node.sync()  # the first finds the document, with its ETag
            counts = {"now": asked.syncs, "before": asked.before_syncs}
            costs = [measured(name, nodes, origin, counts[name], asked.at_once) for name, nodes in fleets.items()]
        size = (home / "www" / "now-0" / "snapshot.json").stat().st_size
    print(f"the snapshot: {asked.models} models, {size:,} bytes; a sync takes {costs[0].seconds:.2f} s, at {asked.at_once} at once")
    print("| version | requests | connections | bytes received + sent | on the wire | processor of the origin |")
    for cost in costs:
        print(shown(cost))
    print("| 10,000 nodes | requests a second | bytes a day | on the wire | of one core |")
    for cost in costs:
        print(of_fleet(cost))
    now = costs[0]
    met = now.requests - now.roots / now.syncs == 1.0 and now.roots <= asked.nodes and now.largest < BUDGET_BYTES
    print(f"roots asked for: {now.roots}; largest exchange: {now.largest} bytes; budget {'met' if met else 'NOT MET'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
