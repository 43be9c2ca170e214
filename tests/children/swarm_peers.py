"""
Processes of a hostile swarm, each in the namespace that it is started in.

    python swarm_peers.py tracker ADDRESS PORT PEER:PORT...    a tracker that names these peers to whoever asks
    python swarm_peers.py listen FILE ADDRESS:PORT...          writes to FILE what is sent to these addresses
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def tracker(address: str, port: int, peers: list[str]) -> None:
    four, six = (b"".join(_compact(one) for one in peers if one.startswith("[") == wanted) for wanted in (False, True))
    body = b"d8:intervali2e12:min intervali1e5:peers%d:%b6:peers6%d:%be" % (len(four), four, len(six), six)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    ThreadingHTTPServer((address, port), Handler).serve_forever()


def _compact(place: str) -> bytes:
    """Return the bytes of *place* in a tracker's answer (BEP 23, and BEP 7 for IPv6)."""
    address, port = _parts(place)
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address) + struct.pack(">H", port)


def _parts(place: str) -> tuple[str, int]:
    address, _, port = place.rpartition(":")
    return address.strip("[]"), int(port)


def listen(file: Path, places: list[str]) -> None:
    def serve(place: str) -> None:
        address, port = _parts(place)
        with socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(5)
                    data = connection.recv(68)
                with file.open("a") as log:
                    log.write(f"{place} {data[:20]!r}\n")

    for place in places:
        threading.Thread(target=serve, args=(place,)).start()


if __name__ == "__main__":
    if sys.argv[1] == "tracker":
        tracker(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    else:
        listen(Path(sys.argv[2]), sys.argv[3:])
