"""
A swarm in network namespaces: a tracker, an origin with nginx and a seeder, and nodes, each with an address of its own on one bridge.

    with swarm.site(folder, tiny("a")) as site:
        node = site.node(1)
        with site.tracker(), site.seeder(), node.daemon():
            assert node.sync().code == 0

Rules that hold here:

1. The real programs: opentracker, aria2c through ``reconcile swarm run`` and ``swarm seed``, nginx, and ``reconcile sync``, each a process.
2. The swarm's process of a node has a user of its own. What the unit's IPAddressDeny does is done by an nft rule of the node's namespace,
   for that user: systemd and its filters are not to be had inside a test.
3. Nothing outlives the ``with``: processes are ended by their ids, and namespaces go with the processes that hold them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reconciler.core import swarm
from reconciler.fetch import aria2_daemon, swarm_daemon
from tests.network import Document, Network
from tests.node import Ran

TOP = Path(__file__).resolve().parents[1]
PATIENCE = 60.0
TRACKER, ORIGIN, HTTP_PORT, TRACKER_PORT = "45.66.0.1", "45.66.0.2", 8080, 6969
ANNOUNCE = f"http://{TRACKER}:{TRACKER_PORT}/announce"
#: What the unit denies and allows, for the user of a node's swarm process.
USER = 61000
NEEDS = ("opentracker", "nginx", "nft", "ip", "unshare", "nsenter", "setpriv")


def needed() -> pytest.MarkDecorator:
    """Return the mark of tests that take namespaces of their own: root, and the programs of ``NEEDS``."""
    missing = [name for name in NEEDS if shutil.which(name) is None] + (["root"] if os.geteuid() else [])
    return pytest.mark.skipif(bool(missing), reason=f"it takes {', '.join(missing)} (apt install opentracker nginx nftables iproute2)")


def until(holds: Callable[[], Any], what: str, within: float = PATIENCE) -> None:
    """Wait until something holds."""
    end = time.monotonic() + within
    while not holds():
        assert time.monotonic() < end, f"not within {within:g} s: {what}"
        time.sleep(0.05)  # processes of several programs, none of which tells


class Namespace:
    """A network namespace with loopback and one address on the bridge."""

    def __init__(self, pid: int, address: str) -> None:
        self.pid, self.address = pid, address

    def words(self, *words: str) -> list[str]:
        """Return a command line that runs in it."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", *words]

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in it, to its end."""
        return subprocess.run(self.words(*words), check=check, capture_output=True, text=True, timeout=PATIENCE)

    @contextlib.contextmanager
    def running(self, *words: str, log: Path, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Run a command in it meanwhile."""
        with log.open("ab") as said, subprocess.Popen(self.words(*words), stdout=said, stderr=said, **more) as process:
            try:
                yield process
            finally:
                if words[0] == "nginx":  # its workers outlive a master that is killed
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=5)
                process.kill()
                process.wait(timeout=PATIENCE)


@contextlib.contextmanager
def _namespace(stack: contextlib.ExitStack) -> Iterator[int]:
    process = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    stack.callback(process.wait)
    stack.callback(process.kill)
    until(lambda: Path(f"/proc/{process.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink(), "a namespace")
    yield process.pid


class Site:
    """The namespaces, and the network's operator."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, data: bytes) -> None:
        self.folder, self._stack, self.data = folder, stack, data
        self.digits = hashlib.sha256(data).hexdigest()
        self.network = Network()
        self.network.now = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
        with _namespace(stack) as pid:
            self._switch = Namespace(pid, "")
        self._switch.run("ip", "link", "add", "br0", "type", "bridge")
        self._switch.run("ip", "link", "set", "br0", "up")
        self._count = 0
        self.tracker_space, self.origin_space = self.space(TRACKER), self.space(ORIGIN)
        self.files = folder / "origin"
        (self.files / "sha256").mkdir(parents=True)
        (self.files / "sha256" / self.digits).write_bytes(data)
        self.trackers: tuple[str, ...] = (ANNOUNCE,)
        self.torrent_bytes = data
        (folder / "model").mkdir()
        (folder / "model" / "model.gguf").write_bytes(data)

    def space(self, address: str) -> Namespace:
        """Make a namespace on the bridge."""
        with _namespace(self._stack) as pid:
            made = Namespace(pid, address)
        self._count += 1
        port = f"p{self._count}"
        self._switch.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._switch.run("ip", "link", "set", port, "master", "br0", "up")
        made.run("ip", "link", "set", "lo", "up")
        made.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        made.run("ip", "link", "set", "eth0", "up")
        return made

    # -- the operator ------------------------------------------------------------------------------------

    @property
    def swarm(self) -> Document:
        """What the snapshot says of peers; the torrent is published at the origin."""
        hashes = swarm.pieces([self.torrent_bytes], swarm.piece_length(len(self.data)))
        torrent = swarm.torrent(self.digits, len(self.data), hashes)
        path = self.files / "torrents" / "sha256" / f"{self.digits}.torrent"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(torrent)
        entry = {
            "digest": f"sha256:{hashlib.sha256(torrent).hexdigest()}",
            "size": len(torrent),
            "info_hash": swarm.info_hash(self.digits, len(self.data), hashes),
            "urls": [f"http://{ORIGIN}:{HTTP_PORT}/torrents/sha256/{self.digits}.torrent"],
        }
        return {"trackers": list(self.trackers), "torrents": {f"sha256:{self.digits}": entry}}

    def snapshot(self, *, peers: bool = True) -> bytes:
        """Return the signed snapshot of the one model."""
        smoke = {"prompt": "Hello", "max_tokens": 4, "timeout": "60s"}
        urls = [f"http://{ORIGIN}:{HTTP_PORT}/sha256/{self.digits}"]
        item = self.network.model("a:v1", self.data, urls=urls, smoke=smoke)
        return self.network.snapshot(item, swarm=self.swarm) if peers else self.network.snapshot(item)

    # -- the programs ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def tracker(self, *, listed: bool = True) -> Iterator[None]:
        """Run opentracker with the whitelist of the snapshot."""
        home = self.folder / "tracker"
        home.mkdir(exist_ok=True)
        (self.folder / "to-list.json").write_bytes(self.snapshot())
        command = [sys.executable, "-m", "reconciler", "snapshot", "swarm", "whitelist", str(self.folder / "to-list.json")]
        white = subprocess.run(command, check=True, capture_output=True, cwd=TOP, timeout=PATIENCE).stdout
        (home / "white").write_bytes(white if listed else b"0" * 40 + b"\n")
        port = str(TRACKER_PORT)
        words = ["opentracker", "-i", TRACKER, "-p", port, "-P", port, "-w", "white", "-u", "nobody", "-d", str(home)]
        with self.tracker_space.running(*words, log=self.folder / "tracker.log", cwd=home):
            until(lambda: self.tracker_space.run("ss", "-ltn").stdout.count(f":{TRACKER_PORT}"), "the tracker")
            yield

    @contextlib.contextmanager
    def http(self, *, rate: str = "0") -> Iterator[None]:
        """Run nginx at the origin, which sends *rate* a second over a connection; ``sent`` counts what it sent."""
        home = self.folder / "nginx"
        home.mkdir(exist_ok=True)
        temporary = " ".join(f"{kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (home / "nginx.conf").write_text(
            f"user root; worker_processes 1; daemon off; pid {home}/pid; error_log {home}/error.log; events {{ }}"
            f"http {{ log_format sent '$uri $body_bytes_sent'; access_log {home}/access.log sent; {temporary}"
            f"server {{ listen {ORIGIN}:{HTTP_PORT}; root {self.files}; limit_rate {rate}; }} }}"
        )
        with self.origin_space.running("nginx", "-c", f"{home}/nginx.conf", "-e", f"{home}/error.log", log=self.folder / "nginx.log"):
            until(lambda: self.origin_space.run("ss", "-ltn").stdout.count(f":{HTTP_PORT}"), "nginx")
            yield

    def sent(self) -> int:
        """Return how many bytes of the model's file nginx sent."""
        with contextlib.suppress(FileNotFoundError):
            rows = [line.split() for line in (self.folder / "nginx" / "access.log").read_text().splitlines()]
            return sum(int(size) for path, size in rows if path == f"/sha256/{self.digits}")
        return 0

    @contextlib.contextmanager
    def seeder(self, *, limit: str = "0") -> Iterator[None]:
        """Run ``reconcile swarm seed`` at the origin."""
        home = self.folder / "seeder"
        home.mkdir(exist_ok=True)
        (self.folder / "to-seed.json").write_bytes(self.snapshot())
        words = [sys.executable, "-m", "reconciler", "swarm", "seed", str(self.folder / "to-seed.json"), "--folder", str(home)]
        words += ["--files", str(self.folder / "model"), "--torrents", str(self.files / "torrents"), "--upload-limit", limit]
        with self.origin_space.running(*words, log=self.folder / "seeder.log", cwd=TOP):
            until(lambda: self.origin_space.run("ss", "-ltn").stdout.count(":6881"), "the seeder")
            yield

    @contextlib.contextmanager
    def liar(self, address: str) -> Iterator[Namespace]:
        """Run an aria2c that seeds other bytes than the torrent's, and says that it has them all."""
        space = self.space(address)
        home = self.folder / f"liar-{address}"
        home.mkdir()
        (home / self.digits).write_bytes(bytes(byte ^ 0xFF for byte in self.data))
        _ = self.swarm
        torrent = self.files / "torrents" / "sha256" / f"{self.digits}.torrent"
        options = ["--no-conf", f"--dir={home}", "--bt-seed-unverified=true", "--seed-ratio=0", f"--bt-tracker={','.join(self.trackers)}"]
        options += ["--enable-dht=false", "--bt-enable-lpd=false", "--enable-peer-exchange=false", "--allow-overwrite=true"]
        options += ["--listen-port=6881"]
        with space.running(str(aria2_daemon.find()), *options, str(torrent), log=self.folder / "liar.log"):
            until(lambda: space.run("ss", "-ltn").stdout.count(":6881"), "the liar")
            yield space

    def node(self, number: int, extra: str = "", *, fenced: bool = True) -> SwarmNode:
        """Return node *number*, which does nothing yet."""
        return SwarmNode(self, self.space(f"45.66.0.{10 + number}"), self.folder / f"node{number}", extra, fenced=fenced)


class SwarmNode:
    """A node, with its swarm process beside it."""

    def __init__(self, site: Site, space: Namespace, folder: Path, extra: str, *, fenced: bool) -> None:
        self.site, self.space, self.folder = site, space, folder
        self.swarm_folder = folder / "swarm"
        self.swarm_folder.mkdir(parents=True)
        os.chown(self.swarm_folder, USER, USER)
        settings = (
            '[network]\nsnapshot = "published.json"\n\n[store]\nreserve = "1MiB"\n\n[download]\nallow_http = true\n'
            f'allowed_hosts = ["{ORIGIN}"]\n\n[swarm]\nenabled = true\nfolder = "swarm"\nreserve = "1MiB"\nalone_after = "1h"\n'
        )
        (folder / "reconcile.toml").write_text(settings + (extra or 'slow_after = "60s"\n'))
        (folder / "root.json").write_bytes(site.network.root())
        (folder / "published.json").write_bytes(site.snapshot())
        if fenced:
            fence(space)

    @property
    def store(self) -> Path:
        """Its store."""
        return self.folder / "store"

    def _reconcile(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "reconciler", *words, "--config", str(self.folder / "reconcile.toml")]

    @contextlib.contextmanager
    def daemon(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run ``reconcile swarm run``, as another user."""
        (self.swarm_folder / "rpc.json").unlink(missing_ok=True)
        words = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", *self._reconcile("swarm", "run")]
        with self.space.running(*words, log=self.folder / "daemon.log", cwd=TOP) as process:
            until(self.answers, f"the swarm's aria2c: {(self.folder / 'daemon.log').read_text()}")
            yield process

    def answers(self) -> bool:
        """Whether the swarm's aria2c listens for calls."""
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            contact = json.loads((self.swarm_folder / "rpc.json").read_bytes())
            return f"127.0.0.1:{contact['port']}" in self.space.run("ss", "-ltn").stdout
        return False

    def sync(self) -> Ran:
        """Run ``reconcile sync``, to its end."""
        command = self.space.words(*self._reconcile("sync", "--json"))
        ran = subprocess.run(command, capture_output=True, text=True, cwd=TOP, timeout=3 * PATIENCE, check=False)
        return Ran(ran.returncode, ran.stdout, ran.stderr)

    @contextlib.contextmanager
    def syncing(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run ``reconcile sync`` meanwhile; what it prints is in ``sync.out``."""
        command = self.space.words(*self._reconcile("sync", "--json"))
        with (
            (self.folder / "sync.out").open("wb") as out,
            subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=TOP) as process,
        ):
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                process.wait(timeout=PATIENCE)

    def change(self, old: str, new: str) -> None:
        """Change its settings."""
        path = self.folder / "reconcile.toml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def arrived(self) -> int:
        """Return how many bytes are in the file that comes from peers."""
        path = self.swarm_folder / "incoming" / self.site.digits / self.site.digits
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_blocks * 512
        return 0

    def holds(self) -> bool:
        """Whether the model is active with the very bytes that were signed, and the store has no other blob."""
        blobs = [path for path in (self.store / "blobs").rglob("*") if path.is_file()]
        whole = all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in blobs)
        return whole and self.site.digits in {path.name for path in blobs} and (self.store / "active" / "models" / "a" / "v1").exists()

    def blob(self) -> Path:
        """Return where the store has the model's file."""
        return self.store / "blobs" / "sha256" / self.site.digits[:2] / self.site.digits


def fence(space: Namespace) -> None:
    """Let the swarm's user reach what the unit lets it reach: this stands for IPAddressDeny and IPAddressAllow of the unit."""
    rules = (
        "add table inet fence",
        "add chain inet fence out { type filter hook output priority 0; }",
        f"add rule inet fence out meta skuid {USER} ip daddr {swarm_daemon.CALLER} accept",
        f"add rule inet fence out meta skuid {USER} ip daddr {{ {', '.join(denied())} }} drop",
        f"add rule inet fence out meta skuid {USER} ip6 daddr {{ {', '.join(denied(version=6))} }} drop",
    )
    for rule in rules:
        space.run("nft", rule)


def denied(version: int = 4) -> list[str]:
    """Return the networks of the IP *version* that the unit denies, from the unit itself: systemd.resource-control(5)."""
    text = (TOP / "deploy/systemd/reconcile-swarm.service").read_text()
    words = [word for line in text.splitlines() if line.startswith("IPAddressDeny=") for word in line.partition("=")[2].split()]
    meant = {
        "localhost": ("127.0.0.0/8", "::1/128"),
        "link-local": ("169.254.0.0/16", "fe80::/64"),
        "multicast": ("224.0.0.0/4", "ff00::/8"),
    }
    return [network for word in words for network in meant.get(word, (word,)) if (":" in network) == (version == 6)]


@contextlib.contextmanager
def site(folder: Path, data: bytes) -> Iterator[Site]:
    """Give a site in *folder*, which other users may look into."""
    with contextlib.ExitStack() as stack:
        yield Site(folder, stack, data)
