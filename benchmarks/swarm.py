"""
How long N nodes behind one line wait for a file, over HTTP and from peers, and how often it leaves the origin.

    python -m benchmarks.swarm --mib 64 --mbit 40 --latency-ms 1 --nodes 1,4,16

Needs root, /dev/net/tun, cc, nginx and opentracker. The origin stands behind the user-space shaper of ``shaped.py``: nginx, opentracker
and the seeder share its line. Each node has a namespace on one bridge, ``reconcile swarm run`` in it, and fetches with the fetcher that
``sync`` uses: verified bytes in its store are the end. HTTP and peers take turns in one run. ``floor`` is the time of one copy over the
line; ``copies`` are the bytes that left the origin, with all headers, by the size of the file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from reconciler.core import swarm as rules
from reconciler.core.swarm import Swarm, Torrent
from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.fetch.seeding import Seeding
from reconciler.fetch.settings import FetchSettings, SwarmSettings
from reconciler.fetch.swarm import SwarmContext, SwarmFetcher
from reconciler.fetch.swarm_daemon import Contact
from reconciler.ports import Fetched, Want
from tests.swarm import Namespace, until

TOP = Path(__file__).resolve().parents[1]
ORIGIN, GATE = "45.66.1.2", "45.66.1.1"


class Memory:
    """Nothing is remembered: there is one run."""

    def read(self) -> dict[str, Seeding]:
        return {}

    def write(self, found: dict[str, Seeding]) -> None:
        del found


# -- a node ----------------------------------------------------------------------------------------


def node(kind: str, folder: Path, go: Path) -> None:
    """Fetch the file as *kind* says once *go* is there, and write down when it was in the store."""
    want, swarm = msgspec.json.decode((folder.parent / "want.json").read_bytes(), type=tuple[Want, Swarm])
    blob = folder / "store" / "blobs" / "sha256" / want.digest[7:9] / want.digest[7:]
    blob.parent.mkdir(parents=True)
    fetcher: Any = Aria2Fetcher(folder / "store" / "staging", FetchSettings(allow_http=True, allowed_hosts=(ORIGIN,)))
    if kind == "peers":
        context = SwarmContext(
            settings=SwarmSettings(folder=folder / "swarm", reserve_bytes=0),
            swarm=swarm,
            staging=folder / "store" / "staging",
            torrents=folder / "store" / "torrents",
            templates=(),
            blob_path=lambda _: blob,
            memory=Memory(),
            now=lambda: datetime.now(UTC),
        )
        fetcher = SwarmFetcher(fetcher, context)
    (folder / "ready").touch()
    until(go.exists, "all nodes are ready")
    for outcome in fetcher.fetch([want], lambda _: None):
        assert isinstance(outcome, Fetched), outcome
        outcome.path.rename(blob)
        (folder / "seconds").write_text(f"{time.monotonic()} {','.join(outcome.sources)}")
    fetcher.close()


# -- the site --------------------------------------------------------------------------------------


class Line:
    """The origin behind its line, and a bridge with nodes at the other end."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, mbit: float, latency_ms: float) -> None:
        binary = folder / "shaper"
        subprocess.run(["cc", "-O2", "-o", str(binary), str(Path(__file__).with_name("shaper.c"))], check=True)
        self.origin, self.gate = self._space(stack, ORIGIN), self._space(stack, GATE)
        near, far = f"n{os.getpid() % 100000}", f"f{os.getpid() % 100000}"
        command = [str(binary), near, far, str(int(latency_ms * 500)), str(mbit * 1e6), "0"]
        shaper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        stack.callback(shaper.wait)
        stack.callback(shaper.kill)
        assert shaper.stdout
        shaper.stdout.readline()
        for space, name, device in ((self.origin, far, "line"), (self.gate, near, "line")):
            subprocess.run(["ip", "link", "set", name, "netns", str(space.pid)], check=True)
            space.run("ip", "link", "set", name, "name", device)
            space.run("ip", "address", "add", f"{space.address}/30", "dev", device)
            space.run("ip", "link", "set", device, "up", "txqueuelen", "10000")
            space.run("ip", "link", "set", "lo", "up")
        self.origin.run("ip", "route", "add", "default", "via", GATE)
        self.gate.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for words in ("link add br0 type bridge", "address add 45.66.0.254/24 dev br0", "link set br0 up"):
            self.gate.run("ip", *words.split())
        self._stack = stack

    @staticmethod
    def _space(stack: contextlib.ExitStack, address: str) -> Namespace:
        process = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        stack.callback(process.wait)
        stack.callback(process.kill)
        until(lambda: Path(f"/proc/{process.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink(), "a namespace")
        return Namespace(process.pid, address)

    def node(self, number: int) -> Namespace:
        """Make the namespace of a node."""
        made = self._space(self._stack, f"45.66.0.{10 + number}")
        port = f"p{number}"
        self.gate.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(made.pid))
        self.gate.run("ip", "link", "set", port, "master", "br0", "up")
        made.run("ip", "link", "set", "lo", "up")
        made.run("ip", "address", "add", f"{made.address}/24", "dev", "eth0")
        made.run("ip", "link", "set", "eth0", "up")
        made.run("ip", "route", "add", "default", "via", "45.66.0.254")
        return made

    def left(self) -> int:
        """Return how many bytes the origin has sent so far."""
        rows = self.origin.run("cat", f"/proc/{self.origin.pid}/net/dev").stdout.splitlines()
        return next(int(row.split(":")[1].split()[8]) for row in rows if row.strip().startswith("line:"))


def publish(folder: Path, size: int) -> None:
    """Make the file, its torrent, and what nodes want."""
    files = folder / "files"
    (files / "sha256").mkdir(parents=True)
    data = os.urandom(size)
    digits = hashlib.sha256(data).hexdigest()
    (files / "sha256" / digits).write_bytes(data)
    hashes = rules.pieces([data], rules.piece_length(size))
    torrent = rules.torrent(digits, size, hashes)
    (files / "file.torrent").write_bytes(torrent)
    entry = Torrent(
        digest=f"sha256:{hashlib.sha256(torrent).hexdigest()}", size=len(torrent), info_hash=rules.info_hash(digits, size, hashes),
        urls=(f"http://{ORIGIN}:8080/file.torrent",),
    )  # fmt: skip
    swarm = Swarm(trackers=(f"http://{ORIGIN}:6969/announce",), torrents={f"sha256:{digits}": entry})
    want = Want(digest=f"sha256:{digits}", size=size, sources=(f"http://{ORIGIN}:8080/sha256/{digits}",))
    (folder / "want.json").write_bytes(msgspec.json.encode((want, swarm)))
    (folder / "white").write_text(f"{entry.info_hash}\n")


@contextlib.contextmanager
def origin(line: Line, folder: Path, seeders: int) -> Iterator[None]:
    """Run nginx, opentracker and *seeders* aria2c as ``reconcile swarm seed`` starts them."""
    want, swarm = msgspec.json.decode((folder / "want.json").read_bytes(), type=tuple[Want, Swarm])
    home = folder / "nginx"
    home.mkdir()
    temporary = " ".join(f"{kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (home / "nginx.conf").write_text(
        f"user root; worker_processes 1; daemon off; pid {home}/pid; error_log {home}/error.log; events {{ }}"
        f"http {{ access_log off; sendfile on; {temporary} server {{ listen {ORIGIN}:8080; root {folder}/files; }} }}"
    )
    log = folder / "origin.log"
    tracker = ["opentracker", "-i", ORIGIN, "-p", "6969", "-P", "6969", "-w", "white", "-u", "nobody", "-d", str(folder)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(line.origin.running("nginx", "-c", f"{home}/nginx.conf", "-e", f"{home}/error.log", log=log))
        stack.enter_context(line.origin.running(*tracker, log=log, cwd=folder))
        stack.enter_context(line.origin.running(*_seeder(folder, want, swarm, seeders), log=log, cwd=TOP))
        for port in (8080, 6969, *range(6881, 6881 + seeders)):
            until(lambda port=port: f":{port}" in line.origin.run("ss", "-ltn").stdout, f"port {port}: {log.read_text()}")  # type: ignore[misc]
        yield


def _seeder(folder: Path, want: Want, swarm: Swarm, seeders: int) -> list[str]:
    """Return the command line of the seeder, which has *seeders* ports."""
    home = folder / "seeder"
    home.mkdir()
    program = (
        "from pathlib import Path",
        "from reconciler.fetch import swarm_daemon as it",
        "from reconciler.fetch.settings import SwarmSettings",
        f"one = it.Seed(torrent=Path('{folder}/files/file.torrent'), file=Path('{folder}/files/sha256/{want.digest[7:]}'))",
        f"it.seed(SwarmSettings(folder=Path('{home}'), ports='6881-{6880 + seeders}'), [one], {list(swarm.trackers)!r})",
    )
    return [sys.executable, "-c", "\n".join(program)]


def measure(line: Line, folder: Path, kind: str, nodes: list[Namespace]) -> tuple[float, int, str]:
    """Return after how many seconds the last of *nodes* has the file, how many bytes left the origin, and where the last had it from."""
    go = folder / "go"
    go.unlink(missing_ok=True)
    homes = [folder / f"node{number}" for number in range(len(nodes))]
    with contextlib.ExitStack() as stack:
        for home, space in zip(homes, nodes, strict=True):
            shutil.rmtree(home, ignore_errors=True)
            (home / "swarm").mkdir(parents=True)
            if kind == "peers":
                (home / "reconcile.toml").write_text('[swarm]\nenabled = true\nfolder = "swarm"\nreserve = "0"\n')
                words = [sys.executable, "-m", "reconciler", "swarm", "run", "--config", str(home / "reconcile.toml")]
                stack.enter_context(space.running(*words, log=home / "log", cwd=TOP))
            words = [sys.executable, "-m", "benchmarks.swarm", "--node", kind, str(home), str(go)]
            stack.enter_context(space.running(*words, log=home / "log", cwd=TOP))
        until(lambda: all((home / "ready").exists() for home in homes), "the nodes", 120)
        if kind == "peers":
            until(lambda: all(_answers(space, home) for space, home in zip(nodes, homes, strict=True)), "their aria2c", 120)
        before, started = line.left(), time.monotonic()
        go.touch()
        until(lambda: all((home / "seconds").exists() and (home / "seconds").read_text() for home in homes), "the last node", 900)
        ended = [(home / "seconds").read_text().partition(" ") for home in homes]
        return max(float(one[0]) for one in ended) - started, line.left() - before, "+".join(sorted({one[2] for one in ended}))


def _answers(space: Namespace, home: Path) -> bool:
    """Return whether the swarm's aria2c in *home* answers calls; it listens for peers when it has a torrent."""
    with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
        contact = msgspec.json.decode((home / "swarm" / "rpc.json").read_bytes(), type=Contact)
        return f":{contact.port} " in space.run("ss", "-Htnl").stdout
    return False


def main() -> None:
    if sys.argv[1:2] == ["--node"]:
        node(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--mbit", type=float, default=40.0)
    parser.add_argument("--latency-ms", type=float, default=1.0, help="there and back, between the origin and the nodes")
    parser.add_argument("--nodes", default="1,4,16")
    parser.add_argument("--seeders", type=int, default=3, help="aria2c that seed at the origin, each with a port")
    parser.add_argument("--kinds", default="http,peers")
    asked = parser.parse_args()
    size = asked.mib << 20
    floor = size * 8 / (asked.mbit * 1e6) * 1500 / 1448  # TCP/IP's headers travel too
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        publish(folder, size)
        line = Line(stack, folder, asked.mbit, asked.latency_ms)
        stack.enter_context(origin(line, folder, asked.seeders))
        counts = [int(one) for one in asked.nodes.split(",")]
        nodes = [line.node(number) for number in range(max(counts))]
        sys.stdout.write(f"{asked.mib} MiB, {asked.mbit:g} Mbit/s, {asked.latency_ms:g} ms: floor {floor:.1f} s\n")
        for count in counts:
            for kind in asked.kinds.split(","):
                seconds, sent, sources = measure(line, folder, kind, nodes[:count])
                where = "peers" if sources == "peers" else "http" if "peers" not in sources else sources
                figures = f"last after {seconds:6.1f} s, {seconds / floor:5.2f} x floor, {sent / size:5.2f} copies, {where}"
                row = f"{count:3} nodes, {kind:5}: {figures}"
                sys.stdout.write(row + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
