"""
Many nodes behind one slow origin: how long until the last has its model, and how many copies leave the origin. Needs root, and what
``shaped.py`` needs.

    python -m benchmarks.fleet_download                        # 16 nodes, 40 Mbit/s, 64 MiB: about eight minutes
    python -m benchmarks.fleet_download --only one,cache       # some of the ways
    python -m benchmarks.fleet_download --json benchmarks/fleet_measured.json   # for fleet_sim.py
    python -m benchmarks.fleet_download --only plain,before --before ../another-version

Every node is a real ``reconcile sync`` with a store of its own, from the snapshot to the swap: the model is a file of random bytes and a
GGUF of 10 KB, which alone the test job loads, so that 16 test jobs on a few cores do not hide what is measured. nginx serves the origin in
a network namespace of its own, behind a shaped link; the cache is nginx with ``deploy/cache/nginx.conf``, on this side of the link. Copies
are the bytes of bodies that the origin's log names, over the model's size. Ways:

one     one node, from the origin: the floor
cache   all nodes, through a cold cache that ``[download] mirrors`` names
killed  the same, and the cache is killed when half a copy has left the origin
aria2   aria2c alone, as often, through a cold cache: nothing is verified
plain   all nodes, each from the origin
before  the same with the sources of another version (--before)

Ends with 1 where a budget is not met: through the cache 1.5 times one node, and 1.1 copies; every node ends with the model active, without
a failure, also where the cache was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import IO

import msgspec
from msgspec import Struct

from benchmarks import shaped
from benchmarks.listening import until, wait_until_it_listens
from tests.network import Network
from tests.node import tiny

HERE = Path(__file__).resolve().parents[1]
ORIGIN = f"http://{shaped.THERE}:{shaped.PORT}"
PATIENCE = 900.0
WAYS = ("one", "cache", "killed", "aria2", "plain")


class Way(Struct, frozen=True, kw_only=True):
    """How one way went: seconds until each node ended, and what left the origin."""

    name: str
    nodes: int
    seconds: list[float]
    copies: float
    #: Nodes that ended with the model active and with exit code 0.
    good: int
    #: Nodes that report a failed model.
    failed: int
    #: Bytes that crossed the link from the origin, with the headers of IP and TCP, over the model's size. None: not measured.
    crossed: float | None = None

    @property
    def last(self) -> float:
        """Seconds until the last node ended."""
        return max(self.seconds)


class Site:
    """The origin's folder, its log, and the network that signs what is in it."""

    def __init__(self, home: Path, mib: int) -> None:
        self.home, self.folder, self.log = home, home / "www", home / "origin.log"
        (self.folder / "sha256").mkdir(parents=True)
        network = Network()
        network.now = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
        self.data = os.urandom(mib << 20)
        files = [("small.gguf", tiny("small"), "model"), ("weights.bin", self.data, "other")]
        artifacts = []
        for path, data, role in files:
            digits = sha256(data).hexdigest()
            (self.folder / "sha256" / digits).write_bytes(data)
            urls = [f"{ORIGIN}/sha256/{digits}"]
            artifacts.append({"path": path, "digest": f"sha256:{digits}", "size": len(data), "urls": urls, "role": role})
        self.big = f"/sha256/{sha256(self.data).hexdigest()}"
        smoke = {"prompt": "Hello", "max_tokens": 2, "timeout": "120s"}
        model = network.model("big:v1", b"x") | {"artifacts": artifacts, "entrypoint": "small.gguf", "smoke": smoke}
        (self.folder / "snapshot.json").write_bytes(network.snapshot(model))
        old = [{key: value for key, value in one.items() if key != "role"} for one in artifacts]  # versions that know no roles refuse them
        (self.folder / "before.json").write_bytes(network.snapshot(model | {"artifacts": old}))
        self.root = network.root()

    def sent(self) -> int:
        """Return how many bytes of bodies left the origin, of requests that ended."""
        return sum(int(line.split()[-1]) for line in self.log.read_text().splitlines()) if self.log.exists() else 0

    def is_idle(self) -> bool:
        """Return whether the origin answers nobody but this question."""
        with urllib.request.urlopen(f"{ORIGIN}{shaped.STATUS}") as answer:
            return b"Writing: 1 " in answer.read()

    def crossed(self) -> int:
        """Return how many bytes crossed the link from the origin."""
        near = f"{shaped.NEAR}{os.getpid() % 10000}:"
        return next(int(line.split()[1]) for line in Path("/proc/net/dev").read_text().splitlines() if line.split()[0] == near)

    def node(self, folder: Path, mirror: str, snapshot: str) -> Path:
        """Make a node in *folder* that asks *mirror* first, if there is one; return its settings."""
        folder.mkdir(parents=True)
        (folder / "root.json").write_bytes(self.root)
        mirrors = f'mirrors = ["{mirror}/{{algorithm}}/{{hex}}"]\n' if mirror else ""
        text = f'[network]\nsnapshot = "{ORIGIN}/{snapshot}"\n\n[store]\nreserve = "1MiB"\n\n[download]\nallow_http = true\n'
        text += f'allowed_hosts = ["{shaped.THERE}", "127.0.0.1"]\n{mirrors}'  # private addresses, which only the settings may name
        (folder / "reconcile.toml").write_text(text)
        return folder / "reconcile.toml"


class Cache:
    """nginx with the configuration of ``deploy/cache``, empty, before the origin."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address, self._folder = f"http://127.0.0.1:{port}", folder
        folder.mkdir()
        site = (HERE / "deploy/cache/nginx.conf").read_text()
        for old, new in (
            ("listen 8081;", f"listen 127.0.0.1:{port};"),
            ("https://models.example.org", ORIGIN),
            ("/var/cache/nginx/reconcile", str(folder / "files")),
        ):
            assert old in site, old
            site = site.replace(old, new)
        temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (folder / "nginx.conf").write_text(
            f"user root; daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{ worker_connections 1024; }}"
            f"http {{ access_log off; {temporary}\n{site} }}"
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[Cache]:
        """Run it."""
        self._process = subprocess.Popen(
            ["/usr/sbin/nginx", "-c", str(self._folder / "nginx.conf"), "-e", str(self._folder / "error.log")], start_new_session=True
        )
        try:
            wait_until_it_listens(self.address.removeprefix("http://"), self._folder / "error.log")
            yield self
        finally:
            self.kill()

    def kill(self) -> None:
        """End it at once, with all its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def finished(
    commands: list[list[str]], log: IO[bytes], meanwhile: Callable[[], None] = lambda: None, tree: Path = HERE
) -> tuple[list[float], list[int]]:
    """Run *commands* side by side; return after how many seconds each ended, and its exit code. *meanwhile* is called meanwhile."""
    began = time.monotonic()
    running = [
        subprocess.Popen(command, stdout=log, stderr=log, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}) for command in commands
    ]
    seconds = [0.0] * len(running)
    ends = {os.pidfd_open(process.pid): index for index, process in enumerate(running)}
    try:
        while ends:
            for end in select.select(list(ends), [], [], 0.05)[0]:
                seconds[ends.pop(end)] = time.monotonic() - began
                os.close(end)
            if time.monotonic() - began > PATIENCE:
                raise TimeoutError
            meanwhile()
    finally:
        for end in ends:
            os.close(end)
        for process in running:
            process.kill()
            process.wait()
    return seconds, [process.returncode for process in running]


def synced(site: Site, name: str, nodes: int, cache: Cache | None, meanwhile: Callable[[], None] = lambda: None, tree: Path = HERE) -> Way:
    """Let *nodes* nodes sync side by side, with the sources in *tree*."""
    document = "snapshot.json" if tree == HERE else "before.json"
    settings = [site.node(site.home / name / str(number), cache.address if cache else "", document) for number in range(nodes)]
    before, link = site.sent(), site.crossed()
    commands = [[sys.executable, "-m", "reconciler", "sync", "--config", str(path)] for path in settings]
    with (site.home / f"{name}.txt").open("wb") as log:
        seconds, codes = finished(commands, log, meanwhile, tree)
    if any(codes):
        print((site.home / f"{name}.txt").read_text())
    states = [_state(path, tree) for path in settings]
    good = sum(code == 0 and state == "active" for code, state in zip(codes, states, strict=True))
    copies, crossed = _copies(site, before, link)
    failed = sum(state == "failed" for state in states)
    return Way(name=name, nodes=nodes, seconds=seconds, copies=copies, crossed=crossed, good=good, failed=failed)


def _state(settings: Path, tree: Path) -> str:
    command = [sys.executable, "-m", "reconciler", "status", "--json", "--config", str(settings)]
    ran = subprocess.run(command, capture_output=True, check=False, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)})
    found = json.loads(ran.stdout)["models"]
    return str(found[0]["state"]) if found else "absent"


def _copies(site: Site, before: int, link: int) -> tuple[float, float]:
    until(site.is_idle, lambda: "requests under way at the origin")  # nginx writes the line of a request that was cut off when it ends it
    return (site.sent() - before) / len(site.data), (site.crossed() - link) / len(site.data)


def killed(site: Site, nodes: int, cache: Cache) -> Way:
    """Kill *cache* when half a copy is in it."""
    files = site.home / "killed-cache" / "files"
    done: list[bool] = []

    def meanwhile() -> None:
        if not done and sum(path.stat().st_size for path in files.rglob("*") if path.is_file()) > len(site.data) / 2:
            cache.kill()
            done.append(True)

    found = synced(site, "killed", nodes, cache, meanwhile)
    assert done, "the cache was not killed"
    return found


def alone(site: Site, nodes: int, cache: Cache) -> Way:
    """Let aria2c fetch as often through *cache*."""
    options = ["--no-conf", "--file-allocation=none", "--max-connection-per-server=8", "--split=8", "--min-split-size=1M", "--quiet=true"]
    folder = site.home / "aria2"
    before, link = site.sent(), site.crossed()
    url = f"{cache.address}{site.big}"
    commands = [["aria2c", *options, f"--dir={folder}", f"--out={number}", url] for number in range(nodes)]
    with (site.home / "aria2.txt").open("wb") as log:
        seconds, codes = finished(commands, log)
    copies, crossed = _copies(site, before, link)
    return Way(name="aria2", nodes=nodes, seconds=seconds, copies=copies, crossed=crossed, good=codes.count(0), failed=0)


def measured(site: Site, name: str, nodes: int, before: Path) -> Way:
    """Return how the way *name* went."""
    if name == "one":
        return synced(site, "one", 1, None)
    if name == "plain":
        return synced(site, "plain", nodes, None)
    if name == "before":
        return synced(site, "before", nodes, None, tree=before)
    with Cache(site.home / f"{name}-cache").running() as cache:
        if name == "cache":
            return synced(site, "cache", nodes, cache)
        return (killed if name == "killed" else alone)(site, nodes, cache)


def unmet(ways: dict[str, Way]) -> list[str]:
    """Return which budgets are not met."""
    found = [
        f"{way.name}: {way.good} of {way.nodes} nodes ended well, {way.failed} failed" for way in ways.values() if way.good < way.nodes
    ]
    if (way := ways.get("cache")) and way.copies > 1.1:
        found.append(f"cache: {way.copies:.2f} copies")
    if way and (one := ways.get("one")) and way.last > 1.5 * one.last:
        found.append(f"cache: {way.last:.1f} s, one node {one.last:.1f} s")
    return found


def main() -> int:
    """Measure, and print rows for RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--mbit", type=float, default=40.0)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--latency-ms", type=float, default=10.0, help="there and back")
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--before", type=Path, default=HERE, help="sources of another version, for the way before")
    asked = parser.parse_args()
    ways: dict[str, Way] = {}
    with tempfile.TemporaryDirectory(prefix="fleet-download-") as scratch:
        site = Site(Path(scratch), asked.mib)
        link = shaped.link(asked.latency_ms, asked.mbit, 0, "")
        with link as peer, shaped.server(site.folder, peer, log=site.log):
            print(f"{asked.nodes} nodes, {asked.mbit:g} Mbit/s, {asked.mib} MiB: at least {asked.mib * 8.388608 / asked.mbit:.1f} s a copy")
            print("| way | nodes | first, median, last node, s | copies that left the origin | that crossed the link | active | failed |")
            for name in asked.only.split(","):
                way = ways[name] = measured(site, name, asked.nodes, asked.before.resolve())
                spread = f"{min(way.seconds):.1f}, {statistics.median(way.seconds):.1f}, {way.last:.1f}"
                print(f"| {name} | {way.nodes} | {spread} | {way.copies:.2f} | {way.crossed:.2f} | {way.good} | {way.failed} |", flush=True)
    if asked.json:
        asked.json.write_bytes(msgspec.json.encode(ways))
    missed = unmet(ways)
    print("budgets met" if not missed else f"NOT MET: {'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
