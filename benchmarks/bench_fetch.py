"""
Fetching and verifying, against what one would use instead, in the same run and in turns.

    python -m benchmarks.bench_fetch                     # 2 GiB and 500 small files from nginx on loopback
    python -m benchmarks.bench_fetch --mib 512 --rounds 3
    python -m benchmarks.bench_fetch --url http://10.9.0.1:8080/   # another server, with the files of --folder: a shaped link, say

Every contender is a process of its own, timed from its start to its end; the medians of all rounds are compared, and each round's order
is another one. Machines differ and so do days: the ratios count, not the rates.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.listening import wait_until_it_listens
from reconciler.fetch import aria2_daemon, staging
from reconciler.fetch import hashing as fetch_hashing
from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.fetch.settings import FetchSettings
from reconciler.ports import Fetched, Want

NGINX = Path("/usr/sbin/nginx")
#: The options with which our downloader runs, as arguments.
SAME = [
    "--no-conf", "--no-netrc", "--file-allocation=none", "--disk-cache=0", "--auto-save-interval=0", "--stream-piece-selector=inorder",
    "--max-connection-per-server=8", "--split=8", "--follow-metalink=false", "--follow-torrent=false",
    "--remote-time=false", "--quiet=true", "--console-log-level=error", "--allow-overwrite=true",
]  # fmt: skip
Work = Callable[[Path], list[str]]


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[str]:
    """Serve *folder* with nginx, privately, on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        config = Path(home, "nginx.conf")
        temporary = " ".join(f"{kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = "user root;" if os.geteuid() == 0 else ""
        config.write_text(
            f"{user} worker_processes 1; daemon off; pid {home}/pid; error_log {home}/error.log;"
            f"events {{ worker_connections 512; }}"
            f"http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000; {temporary}"
            f"server {{ listen 127.0.0.1:{port} backlog=512; root {folder}; }} }}"
        )
        process = subprocess.Popen([str(NGINX), "-c", str(config), "-e", f"{home}/error.log"])
        try:
            wait_until_it_listens(f"127.0.0.1:{port}", Path(home, "error.log"))
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            process.wait()


def fetch(manifest: Path, into: Path) -> None:
    """Fetch what *manifest* lists into *into* and say how it went: the child that is measured."""
    files = json.loads(manifest.read_text())
    wants = [Want(digest=it["digest"], size=it["size"], sources=(it["url"],)) for it in files]
    hosts = tuple({it["url"].split("/")[2].split(":")[0] for it in files})
    fetcher = Aria2Fetcher(into, FetchSettings(allow_http=True, allowed_hosts=hosts))
    done = [outcome for outcome in fetcher.fetch(wants, lambda _: None) if isinstance(outcome, Fetched)]
    fetcher.close()
    assert len(done) == len(wants), "something was not fetched"
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, max_of_children())


def max_of_children() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def measure(commands: dict[str, Work], rounds: int, scratch: Path) -> dict[str, tuple[float, float, str]]:
    """Run each of *commands* in turn, *rounds* times; return the medians of its seconds and processor seconds, and what the last said."""
    spent: dict[str, list[float]] = {name: [] for name in commands}
    times: dict[str, list[float]] = {name: [] for name in commands}
    said = dict.fromkeys(commands, "")
    names = list(commands)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            command = commands[name](scratch)
            os.sync()  # the last one's pages are not written back on this one's time
            begun, before = time.perf_counter(), processor()
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            times[name].append(time.perf_counter() - begun)
            spent[name].append(processor() - before)
            said[name] = ran.stdout.strip()
            print(f"  {name}: {times[name][-1]:.2f} s", file=sys.stderr)
    shutil.rmtree(scratch, ignore_errors=True)
    return {name: (statistics.median(times[name]), statistics.median(spent[name]), said[name]) for name in commands}


def processor() -> float:
    """Return the processor seconds of all children that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ours(manifest: Path) -> Work:
    return lambda scratch: [sys.executable, "-m", "benchmarks.bench_fetch", "--child", str(manifest), str(scratch / "staging")]


def shell(text: str) -> Work:
    """Return a command line in which ``{into}`` is the scratch folder."""
    return lambda scratch: ["sh", "-ec", text.format(into=scratch)]


#: Our own name among the contenders.
OURS = "reconciler (fetched and verified)"


def large_contenders(url: str, file: Path, digest: str) -> dict[str, Work]:
    """Return the ways to one large file."""
    manifest = file.with_suffix(".json")
    manifest.write_text(json.dumps([{"digest": digest, "size": file.stat().st_size, "url": url}]))
    piece = staging.piece_length(file.stat().st_size)
    one = " ".join([str(aria2_daemon.find()), *SAME, f"--piece-length={piece}", f"--min-split-size={piece}", "-d {into} -o f", url])
    return {
        OURS: ours(manifest),
        "aria2c alone, same options (not verified)": shell(one),
        "aria2c, then openssl dgst -sha256": shell(f"{one} && openssl dgst -sha256 {{into}}/f"),
        "aria2c, then sha256sum": shell(f"{one} && sha256sum {{into}}/f"),
        "curl (not verified)": shell(f"curl -s -o {{into}}/f {url}"),
        "curl, then sha256sum": shell(f"curl -s -o {{into}}/f {url} && sha256sum {{into}}/f"),
    }


def large(url: str, file: Path, digest: str, rounds: int, scratch: Path, extra: dict[str, str]) -> str:
    """Compare the ways to one large file; return a table."""
    others = {name: shell(text.format(url=url, into="{into}")) for name, text in extra.items()}
    contenders = large_contenders(url, file, digest) | others
    found = measure(contenders, rounds, scratch)
    return table(found, "aria2c alone, same options (not verified)", file.stat().st_size)


def small_contenders(base: str, files: list[Path]) -> dict[str, Work]:
    """Return the ways to many small files."""
    folder = files[0].parent
    manifest, urls, config = folder / "many.json", folder / "many.txt", folder / "many.curl"
    listed = [{"digest": sha256(path), "size": path.stat().st_size, "url": f"{base}{path.name}"} for path in files]
    manifest.write_text(json.dumps(listed))
    urls.write_text("".join(f"{it['url']}\n" for it in listed))
    config.write_text("".join(f'url = "{it["url"]}"\nremote-name\n' for it in listed))
    binary = aria2_daemon.find()
    return {
        OURS: ours(manifest),
        "aria2c -j16 -i list (not verified)": shell(f"{binary} {' '.join(SAME)} -j16 -d {{into}} -i {urls}"),
        "curl --parallel 16 (not verified)": shell(f"cd {{into}} && curl -s --parallel --parallel-max 16 -K {config}"),
        "curl --parallel 16, then sha256sum": shell(f"cd {{into}} && curl -s --parallel --parallel-max 16 -K {config} && sha256sum * >s"),
        "python -c pass": lambda _: [sys.executable, "-c", "pass"],
    }


def small(base: str, files: list[Path], rounds: int, scratch: Path) -> str:
    """Compare the ways to many small files; return a table."""
    found = measure(small_contenders(base, files), rounds, scratch)
    return table(found, "aria2c -j16 -i list (not verified)", sum(path.stat().st_size for path in files))


def table(found: dict[str, tuple[float, float, str]], base: str, size: int) -> str:
    lines = [f"| {'contender':<44} | seconds | MB/s | ratio | processor |", f"| {'-' * 44} | ------- | ---- | ----- | --------- |"]
    for name, (seconds, spent, _) in found.items():
        lines.append(f"| {name:<44} | {seconds:7.2f} | {size / seconds / 1e6:4.0f} | {seconds / found[base][0]:5.2f} | {spent:7.2f} s |")
    rss = found[OURS][2].split()
    own, child = (f"{int(peak) / 1024:.0f} MiB" for peak in rss)
    lines.append(f"\nPeak memory: {own} in our process, {child} in the largest child (the pages that it maps to hash are counted).")
    return "\n".join(lines)


def hashing(file: Path, rounds: int) -> str:
    """Compare hashing on one core and on two with openssl; return a table."""
    digest, size = sha256(file), file.stat().st_size
    second = file.with_suffix(".2")
    shutil.copyfile(file, second)
    times: dict[str, list[float]] = {"openssl": [], "one": [], "two": []}
    with contextlib.closing(fetch_hashing.Hashers(2)) as hashers:
        list(hashers.check_many([(digest, size, file), (digest, size, second)]))
        for _ in range(rounds):
            begun = time.perf_counter()
            subprocess.run(["openssl", "dgst", "-sha256", str(file)], check=True, stdout=subprocess.DEVNULL)
            times["openssl"].append(time.perf_counter() - begun)
            for name, files in (("one", [file]), ("two", [file, second])):
                begun = time.perf_counter()
                assert all(done.ok for done in hashers.check_many([(digest, size, path) for path in files]))
                times[name].append(time.perf_counter() - begun)
    second.unlink()
    base, one, two = (statistics.median(times[name]) for name in ("openssl", "one", "two"))
    return "\n".join([
        "| contender                       | GB/s | of openssl |",
        "| ------------------------------- | ---- | ---------- |",
        f"| openssl dgst -sha256            | {size / base / 1e9:4.2f} |       1.00 |",
        f"| verify, one file                | {size / one / 1e9:4.2f} | {base / one:10.2f} |",
        f"| verify, two files on two cores  | {2 * size / two / 1e9:4.2f} | {2 * base / two:10.2f} |",
    ])  # fmt: skip


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def make(path: Path, size: int) -> Path:
    """Make a file of *size* random bytes, unless it is there."""
    if not path.exists() or path.stat().st_size != size:
        with path.open("wb") as file:
            for start in range(0, size, 1 << 24):
                file.write(os.urandom(min(1 << 24, size - start)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=2048, help="size of the large file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=500, help="how many files of 64 KiB")
    parser.add_argument("--folder", type=Path, help="where the files are made and downloaded to")
    parser.add_argument("--url", help="a server of --folder's served/, instead of our own nginx")
    parser.add_argument("--extra", action="append", default=[], help="NAME=COMMAND with {url} and {into}: another contender")
    parser.add_argument("--only", choices=["large", "small", "hashing"], action="append")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        fetch(Path(asked.child[0]), Path(asked.child[1]))
        return
    if not asked.url and not NGINX.exists():
        sys.exit("nginx is not installed: give --url instead")
    with contextlib.ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        served = folder / "served"
        served.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        base = asked.url or stack.enter_context(nginx(served))
        parts = asked.only or ["large", "small", "hashing"]
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
              f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}; medians of {asked.rounds}\n")  # fmt: skip
        file = make(served / "large", asked.mib << 20)
        if "large" in parts:
            extra = dict(text.split("=", 1) for text in asked.extra)
            print(f"One file of {asked.mib} MiB\n\n{large(base + 'large', file, sha256(file), asked.rounds, folder / 'scratch', extra)}\n")
        if "small" in parts:
            files = [make(served / f"{index:03}", 64 << 10) for index in range(asked.files)]
            print(f"{asked.files} files of 64 KiB\n\n{small(base, files, asked.rounds, folder / 'scratch')}\n")
        if "hashing" in parts:
            print(f"Hashing {asked.mib} MiB, warm cache\n\n{hashing(file, asked.rounds)}\n")


if __name__ == "__main__":
    main()
