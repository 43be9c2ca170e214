"""Certificates, credentials, proxies: who may read along, and who is sent a password."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from reconciler.core.errors import SettingsError
from reconciler.fetch import credentials
from reconciler.fetch import resolver as fetch_resolver
from reconciler.fetch.connection import Connection, Endpoint, TlsContext
from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.sources import Failure, Rules
from reconciler.ports import Fetched, FetchFailed, Want
from tests import hostile_server as bad
from tests.fetching import DIRECT, FAST, LARGE, SMALL, EventRecorder, collect, good, name_of, some, want
from tests.hostile_server import Behaviour, Exchange, HostileServer, honest

DATA = some(LARGE, 1)
SHORT = some(SMALL, 2)
#: Both ways of fetching: through aria2, and with the answer that resolves the source.
WAYS = pytest.mark.parametrize(("settings", "data"), [(FAST, DATA), (DIRECT, SHORT)], ids=["aria2", "direct"])


class Authority:
    """A certificate authority of our own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test Authority")])
        self.certificate = self._sign(self._name, self._key, authority=True, days=10)
        self.file = folder / "authority.pem"
        self.file.write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def _sign(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool, days: int, host: str = "127.0.0.1"
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder().subject_name(name).issuer_name(self._name).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=20)).not_valid_after(now + dt.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )  # fmt: skip
        if not authority:
            names = [x509.DNSName(host)] if host[0].isalpha() else [x509.IPAddress(ipaddress.ip_address(host))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def server(self, *, days: int = 10, host: str = "127.0.0.1") -> ssl.SSLContext:
        """Return what a server needs to prove that it is *host*."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        signed = self._sign(name, key, authority=False, days=days, host=host)
        both = self._folder / f"{host}{days}.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        both.write_bytes(private + signed.public_bytes(Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(both)
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@contextlib.contextmanager
def fetched(
    staging: Path, settings: FetchSettings, wants: list[Want], recorder: EventRecorder | None = None
) -> Iterator[Fetched | FetchFailed]:
    fetcher = Aria2Fetcher(staging, settings)
    try:
        yield collect(fetcher, wants, recorder)[wants[0].digest]
    finally:
        fetcher.close()


@WAYS
def test_a_certificate_of_the_operators_own_authority(tmp_path: Path, authority: Authority, settings: FetchSettings, data: bytes) -> None:
    settings = msgspec.structs.replace(settings, ca_file=authority.file)
    with HostileServer(tls=authority.server()) as server:
        wanted = want(data, server.on("/x", honest(data)))
        with fetched(tmp_path / "s", settings, [wanted]) as outcome:
            good(outcome, data)


@pytest.mark.parametrize(("trusted", "days", "host"), [(False, 10, "127.0.0.1"), (True, -5, "127.0.0.1"), (True, 10, "other.example")])
@WAYS
def test_an_unknown_an_expired_and_another_hosts_certificate_are_refused(
    tmp_path: Path, authority: Authority, settings: FetchSettings, data: bytes, trusted: bool, days: int, host: str
) -> None:
    settings = msgspec.structs.replace(settings, ca_file=authority.file if trusted else None)
    recorder = EventRecorder()
    with HostileServer(tls=authority.server(days=days, host=host)) as server:
        wanted = want(data, server.on("/x", honest(data)))
        with fetched(tmp_path / "s", settings, [wanted], recorder) as outcome:
            assert isinstance(outcome, FetchFailed)
        assert server.requests == []
    assert any("certificate" in it.detail for it in recorder.incidents)


def guarded(behaviour: Behaviour, pair: str) -> Behaviour:
    """Answer only who gives the right name and password."""
    expected = "Basic " + base64.b64encode(pair.encode()).decode()
    return lambda it: (behaviour if it.headers.get("authorization") == expected else bad.status(401))(it)


def netrc(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "netrc"
    path.write_text(text)
    path.chmod(0o600)
    return path


@WAYS
def test_credentials_go_to_their_host(tmp_path: Path, settings: FetchSettings, data: bytes) -> None:
    with HostileServer() as server:
        wanted = want(data, server.on("/x", guarded(honest(data), "ann:word")))
        with fetched(tmp_path / "a", settings, [wanted]) as outcome:
            assert isinstance(outcome, FetchFailed)
            assert "401" in outcome.error.message
        known = msgspec.structs.replace(settings, netrc=netrc(tmp_path, "machine 127.0.0.1 login ann password word\n"))
        with fetched(tmp_path / "b", known, [wanted]) as outcome:
            good(outcome, data)
    left = [path for path in (tmp_path / "b").rglob("*") if path.is_file() and path.name != "data"]
    assert not [path for path in left if b"word" in path.read_bytes()]


@WAYS
def test_credentials_never_cross_a_host(tmp_path: Path, settings: FetchSettings, data: bytes) -> None:
    with HostileServer() as server, HostileServer() as other:
        other.on("/y", honest(data))
        away = f"http://localhost:{other.port}/y"
        url = server.on("/x", guarded(bad.redirect(away), "ann:word"))
        known = msgspec.structs.replace(
            settings, netrc=netrc(tmp_path, "machine 127.0.0.1 login ann password word\n"), allowed_hosts=("127.0.0.1", "localhost")
        )
        with fetched(tmp_path / "s", known, [want(data, url)]) as outcome:
            good(outcome, data)
        assert server.requests
        assert other.requests
        assert all("authorization" not in it.headers for it in other.requests)


def test_credentials_do_not_follow_a_redirect_that_the_downloader_meets(tmp_path: Path) -> None:
    """Within the allowed hosts, and after the source was probed: the downloader looks the host up anew."""
    with HostileServer() as server, HostileServer() as other:
        away = f"http://localhost:{other.port}/y"
        other.on("/y", honest(DATA))
        behaviour = bad.on_probe(honest(DATA), bad.redirect(away))
        url = server.on("/x", guarded(behaviour, "ann:word"))
        second = f"http://localhost:{other.port}/y"
        known = msgspec.structs.replace(FAST, netrc=netrc(tmp_path, "machine 127.0.0.1 login ann password word\n"))
        with fetched(tmp_path / "s", known, [want(DATA, url, second)]) as outcome:
            good(outcome, DATA)
        assert all("authorization" not in it.headers for it in other.requests)


def test_a_default_entry_is_for_nobody(tmp_path: Path) -> None:
    known = credentials.read(netrc(tmp_path, "default login ann password word\n"))
    assert known.header("https://a.example/") is None
    assert known.text() == ""


def test_credentials_are_not_sent_in_the_clear(tmp_path: Path) -> None:
    known = credentials.read(netrc(tmp_path, "machine a.example login ann password word\n"))
    assert known.header("https://a.example/x")
    assert known.header("http://a.example/x") is None
    assert not known.covers(("http://a.example/x",))
    assert "word" not in repr(vars(known))


@pytest.mark.parametrize("text", ["machine", "machine a login b password 'c d", "machine a.example login ann password wörd\n", "\x00"])
def test_a_malformed_file_is_refused_without_its_words(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        credentials.read(netrc(tmp_path, text))
    assert "wörd" not in str(caught.value)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = netrc(tmp_path, "machine a.example login ann password word\n")
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="can be read by others"):
        credentials.read(path)


def test_the_environments_netrc_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ann password word\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    with HostileServer() as server:
        wanted = want(DATA, server.on("/x", honest(DATA)))
        with fetched(tmp_path / "s", FAST, [wanted]) as outcome:
            good(outcome, DATA)
        assert all("authorization" not in it.headers for it in server.requests)


def forward(origin: dict[str, bytes]) -> Behaviour:
    """Be a proxy for plain http, which knows the *origin* by itself."""

    def behave(it: Exchange) -> None:
        honest(origin[it.path])(it)

    return behave


@WAYS
def test_a_proxy_is_used_and_knows_names_that_we_do_not(tmp_path: Path, settings: FetchSettings, data: bytes) -> None:
    with HostileServer() as proxy:
        proxy.on("/x", forward({"/x": data}))
        through = msgspec.structs.replace(settings, proxy=f"http://ann:word@127.0.0.1:{proxy.port}", allow_http=True)
        with fetched(tmp_path / "s", through, [want(data, "http://models.invalid/x")]) as outcome:
            good(outcome, data)
        expected = "Basic " + base64.b64encode(b"ann:word").decode()
        assert {it.headers.get("proxy-authorization") for it in proxy.requests} == {expected}


@WAYS
def test_this_machine_is_not_reached_through_a_proxy(tmp_path: Path, settings: FetchSettings, data: bytes) -> None:
    with HostileServer() as server, HostileServer() as proxy:
        through = msgspec.structs.replace(settings, proxy=f"http://127.0.0.1:{proxy.port}")
        with fetched(tmp_path / "s", through, [want(data, server.on("/x", honest(data)))]) as outcome:
            good(outcome, data)
        assert proxy.requests == []


@WAYS
def test_a_name_that_leads_to_a_private_address_is_not_asked(
    tmp_path: Path, settings: FetchSettings, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    real = socket.getaddrinfo

    def lead_home(host: str, *args: object, **kwargs: object) -> object:
        return real("127.0.0.1" if host == "models.example" else host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", lead_home)
    with HostileServer() as server:
        server.on("/x", honest(data))
        url = f"http://models.example:{server.port}/x"
        recorder = EventRecorder()
        with fetched(tmp_path / "s", msgspec.structs.replace(settings, allow_http=True), [want(data, url)], recorder) as outcome:
            assert isinstance(outcome, FetchFailed)
        assert server.requests == []
    assert any("private address" in it.detail for it in recorder.incidents)
    assert {it.blob for it in recorder.incidents} == {name_of(data)}


# -- threads ---------------------------------------------------------------------------------------


def test_a_connection_is_cut_and_its_tls_state_stays_with_the_thread_that_reads(authority: Authority) -> None:
    ours, theirs = socket.socketpair()
    context, served = authority.server(), list[ssl.SSLSocket]()
    greeting = threading.Thread(target=lambda: served.append(context.wrap_socket(theirs, server_side=True)), daemon=True)
    greeting.start()
    connection = Connection(Endpoint(host="127.0.0.1", port=443, tls=True), tls=TlsContext(None), timeout=1.0)
    worker = fetch_resolver._Worker(FAST, credentials.Credentials({}), TlsContext(None))
    with ssl.create_default_context(cafile=authority.file).wrap_socket(ours, server_hostname="127.0.0.1") as sock:
        greeting.join()
        connection.sock, worker._current = sock, connection

        worker.abort()

        assert sock.version() is not None, "a read that had begun would find no session"
        assert sock.recv(1) == b""
    connection.sock = None
    worker.abort()
    served[0].close()


def test_whatever_goes_wrong_with_a_question_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_resolver._Worker, "_follow", lambda *_: 1 // 0)
    woken = threading.Event()
    resolver = fetch_resolver.Resolver(FAST, credentials.Credentials({}), woken.set)
    rules = Rules(hosts=frozenset(), trusted=frozenset(), allow_http=False)

    resolver.submit(fetch_resolver.ProbeRequest(token=1, url="https://a.example/", digest=name_of(SHORT), size=len(SHORT), rules=rules))

    assert woken.wait(30)
    assert [result for _, result in resolver.results()] == [Failure(text="unexpected: ZeroDivisionError", permanent=False)]
    resolver.close()
