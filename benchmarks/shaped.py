"""
A server behind a link with latency, a rate and loss; for ``bench_fetch.py --url``. Needs root, /dev/net/tun, ip, cc and nginx.

    python -m benchmarks.shaped FOLDER --latency-ms 40 --mbit 1000 --loss-ppm 100 -- COMMAND...

nginx serves FOLDER in a network namespace of its own, at http://10.213.0.2:8080/; COMMAND runs here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.listening import until, wait_until_it_listens

HERE, THERE, PORT = "10.213.0.1", "10.213.0.2", 8080
#: Where the server says how many requests it answers.
STATUS = "/-/status"
#: What the name of the device on this side begins with; the number of this process follows.
NEAR = "bnear"


@contextlib.contextmanager
def link(latency_ms: float, mbit: float, loss_ppm: int, congestion: str) -> Iterator[int]:
    """Make the link; give the process id that lives at its other end."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        binary = Path(folder, "shaper")
        subprocess.run(["cc", "-O2", "-o", str(binary), str(Path(__file__).with_name("shaper.c"))], check=True)
        near, far = f"{NEAR}{os.getpid() % 10000}", f"bfar{os.getpid() % 10000}"
        delay = str(int(latency_ms * 1000 / 2))
        command = [str(binary), near, far, delay, str(mbit * 1e6), str(loss_ppm)]
        shaper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        stack.callback(shaper.wait)
        stack.callback(shaper.kill)
        assert shaper.stdout
        shaper.stdout.readline()
        peer = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        stack.callback(peer.wait)
        stack.callback(peer.kill)
        until(lambda: Path(f"/proc/{peer.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink(), lambda: "a network namespace")
        inside = ["nsenter", f"--net=/proc/{peer.pid}/ns/net"]
        for made in (
            ["ip", "link", "set", far, "netns", str(peer.pid)],
            ["ip", "addr", "add", f"{HERE}/30", "dev", near],
            ["ip", "link", "set", near, "up", "txqueuelen", "10000"],
            [*inside, "ip", "addr", "add", f"{THERE}/30", "dev", far],
            [*inside, "ip", "link", "set", far, "up", "txqueuelen", "10000"],
            [*inside, "ip", "link", "set", "lo", "up"],
            # By route: the sysctl of another namespace than the first takes few of them.
            [*inside, "ip", "route", "replace", f"{HERE}/32", "dev", far, *(["congctl", congestion] if congestion else [])],
        ):
            subprocess.run(made, check=True)
        yield peer.pid


@contextlib.contextmanager
def server(folder: Path, peer: int, log: Path | None = None) -> Iterator[None]:
    """Serve *folder* at the other end; of each request a line goes to *log*: its path, its status, and the bytes of its answer's body."""
    with tempfile.TemporaryDirectory() as home:
        config = Path(home, "nginx.conf")
        temporary = " ".join(f"{kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        config.write_text(
            f"user root; worker_processes 1; daemon off; pid {home}/pid; error_log {home}/error.log;"
            f"events {{ worker_connections 512; }}"
            f"http {{ log_format line '$request_uri $status $body_bytes_sent'; access_log {f'{log} line' if log else 'off'};"
            f"sendfile on; keepalive_requests 100000; {temporary}"
            f"server {{ listen {THERE}:{PORT} backlog=512; root {folder}; location = {STATUS} {{ stub_status; access_log off; }} }} }}"
        )
        inside = ["nsenter", f"--net=/proc/{peer}/ns/net"]
        process = subprocess.Popen([*inside, "/usr/sbin/nginx", "-c", str(config), "-e", f"{home}/error.log"])
        try:
            wait_until_it_listens(f"{THERE}:{PORT}", Path(home, "error.log"))
            yield
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=40.0, help="there and back")
    parser.add_argument("--mbit", type=float, default=1000.0)
    parser.add_argument("--loss-ppm", type=int, default=0)
    parser.add_argument("--congestion", default="", help="the sender's, where it is not the system's")
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args()
    with link(asked.latency_ms, asked.mbit, asked.loss_ppm, asked.congestion) as peer, server(asked.folder, peer):
        sys.exit(subprocess.run(asked.command, check=False).returncode)


if __name__ == "__main__":
    main()
