"""
A real OCI registry on this machine: Debian's ``docker-registry`` (the CNCF distribution), open, with passwords, or with a token service.

The token service is here, and signs as the registry asks for it (distribution, "Token Authentication Implementation"): a JWT with the
certificate in its header.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import json
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

PAIR = ("ann", "word")
#: bcrypt of the password, which the registry asks for.
_HTPASSWD = "ann:$2b$05$QugJxlMvCS5aEysc6GPD0uDHmyPT7CQGdU8hG2YkZcUpOVuVfk5fm\n"
_PROGRAM = shutil.which("docker-registry")


def require() -> str:
    """Return the program, or skip the test where this machine lacks it."""
    if _PROGRAM is None:
        pytest.skip("this machine has no docker-registry (apt install docker-registry)")
    return _PROGRAM


class Registry:
    """A registry that runs, at ``address`` (host:port)."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder


@contextlib.contextmanager
def running(folder: Path, auth: Literal["none", "htpasswd", "token"] = "none", service: TokenService | None = None) -> Iterator[Registry]:
    """Give a registry that keeps its blobs in *folder*."""
    program = require()
    port = _free_port()
    folder.mkdir()
    config: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if auth == "htpasswd":
        (folder / "htpasswd").write_text(_HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "registry", "path": str(folder / "htpasswd")}}
    if auth == "token":
        assert service
        (folder / "bundle.pem").write_bytes(service.certificate.public_bytes(Encoding.PEM))
        config["auth"] = {
            "token": {"realm": service.url, "service": "registry", "issuer": "tests", "rootcertbundle": str(folder / "bundle.pem")}
        }
    (folder / "config.yml").write_text(json.dumps(config))
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log) as process,
    ):
        try:
            _wait_for(port, process)
            yield Registry(f"127.0.0.1:{port}", folder)
        finally:
            process.kill()


@contextlib.contextmanager
def behind_tokens(
    folder: Path, pair: tuple[str, str] | None, fill: Callable[[Registry], object]
) -> Iterator[tuple[Registry, TokenService]]:
    """Give a registry in *folder* that asks for tokens, and its service, which wants *pair*. *fill* pushes before, while it is open."""
    service = TokenService(pair)
    try:
        with running(folder / "open") as unlocked:
            fill(unlocked)
        with running(folder / "registry", "token", service) as served:
            shutil.copytree(folder / "open" / "data", folder / "registry" / "data", dirs_exist_ok=True)
            yield served, service
    finally:
        service.close()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert process.poll() is None, "the registry did not start"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    pytest.fail("the registry does not listen")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class TokenService(ThreadingHTTPServer):
    """Gives out tokens for what is asked; with *pair*, to whoever has that name and password alone."""

    daemon_threads = True

    def __init__(self, pair: tuple[str, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pair = pair
        self.asked: list[dict[str, str]] = []
        self.given: list[str] = []
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
        now = dt.datetime.now(dt.UTC)
        self.certificate = (
            x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(self.key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1)).sign(self.key, hashes.SHA256())
        )  # fmt: skip
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}/token"

    def token(self, query: dict[str, list[str]]) -> str:
        now = int(time.time())
        access = []
        for scope in query.get("scope", []):
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(self.certificate.public_bytes(Encoding.DER)).decode()]}
        claims = {
            "iss": "tests", "sub": "", "aud": "registry", "exp": now + 300, "nbf": now - 10, "iat": now, "jti": secrets.token_hex(8),
            "access": access,
        }  # fmt: skip
        message = b".".join(_b64(json.dumps(part).encode()) for part in (header, claims))
        r, s = decode_dss_signature(self.key.sign(message, ec.ECDSA(hashes.SHA256())))
        made = (message + b"." + _b64(r.to_bytes(32, "big") + s.to_bytes(32, "big"))).decode()
        self.given.append(made)
        return made

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


def _b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


class _Handler(BaseHTTPRequestHandler):
    server: TokenService
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        service = self.server
        service.asked.append({name.lower(): value for name, value in self.headers.items()})
        expected = "Basic " + base64.b64encode(":".join(service.pair).encode()).decode() if service.pair else None
        if expected and self.headers.get("Authorization") != expected:
            self._answer(401, b"{}")
            return
        token = service.token(parse_qs(urlsplit(self.path).query))
        self._answer(200, json.dumps({"token": token, "expires_in": 300}).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
