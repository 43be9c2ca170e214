"""
Many models at once, and one of many files: a whole ``reconcile apply``, with its test jobs, beside ``aria2c -i`` of the same files, which
verifies and tests nothing. Over a link with a rate (``benchmarks/shaped.py``); needs root, as that does.

    python -m benchmarks.many_models                    # 40 models of 23 MiB, and one model of 200 files, 3 rounds
    python -m benchmarks.many_models --mbit 1000

It says, for each: the seconds of both, their ratio, and when the first and the last model became active. Goals: 1.05, and a first model
that is active when its own bytes are here and tested, not at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks import shaped
from benchmarks.bench_fetch import SAME
from reconciler.demo import models
from reconciler.fetch import aria2_daemon
from tests.network import Document, Network

BASE = f"http://{shaped.THERE}:{shaped.PORT}"
_SMOKE = {"prompt": "Hello", "max_tokens": 4, "timeout": "60s"}


def served(folder: Path, data: bytes) -> tuple[str, str]:
    """Put *data* among what is served; return its digest and its URL."""
    digits = hashlib.sha256(data).hexdigest()
    (folder / digits).write_bytes(data)
    return f"sha256:{digits}", f"{BASE}/{digits}"


def forty(network: Network, folder: Path, count: int) -> list[Document]:
    """Return *count* models that differ in their last weights."""
    models.write(models.Shape(seed="many", width=768, layers=2), folder / "model")
    data = (folder / "model").read_bytes()
    (folder / "model").unlink()
    found = []
    for number in range(count):
        weights = b"".join(bytes((low, 0x2C)) for low in hashlib.sha256(b"%d" % number).digest())  # halves from 0.06 to 0.08
        content = data[: -len(weights)] + weights
        _, url = served(folder, content)
        found.append(network.model(f"model-{number}:v1", content, urls=[url], smoke=_SMOKE))
    return found


def of_many_files(network: Network, folder: Path, count: int) -> list[Document]:
    """Return one model of a small GGUF file and *count* files of 4 MiB beside it."""
    models.write(models.Shape(seed="one"), folder / "model")
    content = (folder / "model").read_bytes()
    (folder / "model").unlink()
    _, url = served(folder, content)
    entry = network.model("large:v1", content, urls=[url], smoke=_SMOKE)
    for number in range(count):
        digest, url = served(folder, os.urandom(4 << 20))
        entry["artifacts"].append({"path": f"shard-{number:03}.bin", "digest": digest, "size": 4 << 20, "urls": [url]})
    return [entry]


def node(folder: Path, network: Network, entries: list[Document]) -> Path:
    """Make a node in *folder* that has accepted a snapshot of *entries*; return its settings."""
    folder.mkdir()
    settings = folder / "reconcile.toml"
    settings.write_text(f'[network]\nsnapshot = "published.json"\n[download]\nallow_http = true\nallowed_hosts = ["{shaped.THERE}"]\n')
    (folder / "root.json").write_bytes(network.root())
    (folder / "published.json").write_bytes(network.snapshot(*entries))
    subprocess.run([sys.executable, "-m", "reconciler", "lock", "--config", str(settings)], check=True, stdout=subprocess.DEVNULL)
    return settings


def apply(settings: Path) -> tuple[float, list[float]]:
    """Apply; return its seconds, and after how many seconds each model became active."""
    begun, active = time.monotonic(), []
    words = [sys.executable, "-m", "reconciler", "apply", "--json", "--config", str(settings)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout
        for line in child.stdout:
            event = json.loads(line)
            if event["type"] == "model-done" and event["state"] == "active":
                active.append(time.monotonic() - begun)
    assert child.returncode == 0, child.returncode
    return time.monotonic() - begun, active


def fetch(urls: list[str], into: Path) -> float:
    """Fetch *urls* with ``aria2c -i``; return its seconds."""
    into.mkdir()
    (into / "urls").write_text("".join(f"{url}\n" for url in urls))
    begun = time.monotonic()
    subprocess.run([str(aria2_daemon.find()), *SAME, "-j16", "-d", str(into), "-i", str(into / "urls")], check=True)
    return time.monotonic() - begun


def rounds(what: str, network: Network, entries: list[Document], scratch: Path, count: int) -> Iterator[str]:
    """Yield a line of the table for *entries*, measured *count* times in turns."""
    urls = [one["urls"][0] for entry in entries for one in entry["artifacts"]]
    size = sum(one["size"] for entry in entries for one in entry["artifacts"])
    ours, theirs, first, last = [], [], [], []
    for turn in range(count):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            theirs.append(fetch(urls, Path(folder, "peer")))
            seconds, active = apply(node(Path(folder, "node"), network, entries))
            assert len(active) == len(entries), active
        ours.append(seconds)
        first.append(active[0])
        last.append(active[-1])
        print(f"  {what}, {turn + 1}: {seconds:.2f} s, aria2c {theirs[-1]:.2f} s, first {active[0]:.2f} s", file=sys.stderr)
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    middle = [statistics.median(one) for one in (ours, theirs, first, last)]
    yield f"| {what} | {size / 1e6:,.0f} | {middle[0]:.1f} | {middle[1]:.1f} | {ratio:.2f} | {middle[2]:.1f} | {middle[3]:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=40)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mbit", type=float, default=400.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        scratch, folder = Path(work), Path(work, "served")
        scratch.chmod(0o755)
        folder.mkdir()
        network = Network()
        network.now = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
        sets = {
            f"{given.models} models": forty(network, folder, given.models),
            f"one model of {given.files + 1} files": of_many_files(network, folder, given.files),
        }
        print(f"over {given.mbit:g} Mbit/s, medians of {given.rounds}\n")
        print("| what | MB | apply, s | aria2c -i, s | ratio | first active, s | last active, s |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        with shaped.link(2.0, given.mbit, 0, "") as peer, shaped.server(folder, peer):
            for what, entries in sets.items():
                for line in rounds(what, network, entries, scratch, given.rounds):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
