"""
Where a source may redirect to, what it takes along, and which host is sent which secret.

Attacks: another host with a token, a look-alike of a permitted host, this very machine, a private address, a token service elsewhere, a
download that mixes a host with a token and one without.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest

from reconciler.core.errors import SettingsError
from reconciler.fetch import credentials, http, sources, token_service
from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.fetch.settings import CredentialSource, FetchSettings
from reconciler.fetch.sources import Refused, Rules
from reconciler.ports import Fetched, FetchFailed, Want
from tests import hostile_server as bad
from tests.fetching import DIRECT, FAST, LARGE, EventRecorder, collect, good, my_aria2, some, want
from tests.hostile_server import Behaviour, Exchange, HostileServer, honest

DATA = some(LARGE, 7)
SHORT = some(2_000, 8)
WAYS = pytest.mark.parametrize(("settings", "data"), [(FAST, DATA), (DIRECT, SHORT)], ids=["aria2", "direct"])
TOKEN = "hf_SECRETtoken123"


def rules(*urls: str, signed: dict[str, Any] | None = None, own: dict[str, Any] | None = None, **more: Any) -> Rules:
    given = {"signed_redirects": signed or {}, "own_redirects": own or {}} | more
    return sources.rules([Want(digest="sha256:" + "ab" * 32, size=1, sources=urls)], msgspec.convert(given, FetchSettings))


@contextlib.contextmanager
def fetched(staging: Path, settings: FetchSettings, *wants: Want, recorder: EventRecorder | None = None) -> Iterator[Fetched | FetchFailed]:
    fetcher = Aria2Fetcher(staging, settings)
    try:
        yield collect(fetcher, list(wants), recorder)[wants[0].digest]
    finally:
        fetcher.close()


def token_file(tmp_path: Path, text: str = TOKEN) -> str:
    path = tmp_path / "token"
    path.write_text(text + "\n")
    path.chmod(0o600)
    return str(path)


def bearer(tmp_path: Path, host: str = "127.0.0.1") -> tuple[CredentialSource, ...]:
    return (CredentialSource(host=host, kind="bearer", file=token_file(tmp_path)),)


def guarded(behaviour: Behaviour, header: str = f"Bearer {TOKEN}", challenge: str = "") -> Behaviour:
    refusal = bad.status(401, *([("WWW-Authenticate", challenge)] if challenge else []))
    return lambda it: (behaviour if it.headers.get("authorization") == header else refusal)(it)


# -- redirects -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["https://cdn.hf.co/x", "https://a.b.hf.co/x", "https://CDN.HF.CO./x", "https://cdn.hf.co:8443/x"])
def test_a_signed_rule_permits_what_it_names(target: str) -> None:
    rules("https://hub.example/x", signed={"Hub.Example.": ["*.HF.co"]}).check(target, "https://hub.example/x")


@pytest.mark.parametrize(
    "target",
    [
        "https://hf.co/x", "https://evilhf.co/x", "https://cdn.hf.co.evil.example/x", "https://evil.example/cdn.hf.co", "https://hf.co%2eevil/x",
        "https://cdn.hf.co@evil.example/x", "https://evil.example\\.hf.co/x", "https://evil.example?.hf.co", "https://cdn.hf.co%00.evil/x",
        "https://cdn.hf.co\u3002evil/x", "http://cdn.hf.co/x", "https://cdn。hf。co/x", "ftp://cdn.hf.co/x", "https://*.hf.co/x",
    ],
)  # fmt: skip
def test_a_look_alike_of_a_permitted_host_is_refused(target: str) -> None:
    with pytest.raises(Refused):
        rules("https://hub.example/x", signed={"hub.example": ["*.hf.co"]}).check(target, "https://hub.example/x")


def test_a_rule_is_for_its_source_alone_and_for_redirects_alone() -> None:
    found = rules("https://hub.example/x", "https://other.example/x", signed={"hub.example": ["cdn.example"]})
    with pytest.raises(Refused):
        found.check("https://cdn.example/x", "https://other.example/x")
    with pytest.raises(Refused):
        found.check("https://cdn.example/x")


def test_allowed_hosts_narrow_what_the_network_permits_and_own_redirects_widen_it() -> None:
    url, target = "https://hub.example/x", "https://cdn.example/x"
    with pytest.raises(Refused):
        rules(url, signed={"hub.example": ["cdn.example"]}, allowed_hosts=["hub.example"]).check(target, url)
    rules(url, own={"hub.example": ["cdn.example"]}, allowed_hosts=["hub.example"]).check(target, url)
    rules(url, allowed_hosts=["*.example"]).check(target, url)


def test_a_refusal_says_from_where_to_where_and_which_line_would_allow_it() -> None:
    with pytest.raises(Refused) as refused:
        rules("https://hub.example/x").check("https://cdn.example/x", "https://hub.example/x")
    assert "from hub.example to cdn.example" in str(refused.value)
    assert '[download] redirects = {"hub.example" = ["cdn.example"]}' in str(refused.value)


@pytest.mark.parametrize("target", ["http://127.0.0.1/x", "http://localhost:8080/x", "https://[::1]/x", "https://127.9.9.9/x"])
def test_no_redirect_leads_to_this_machine_unless_the_settings_name_it(target: str) -> None:
    url = "https://hub.example/x"
    host = sources.host_of(target)
    with pytest.raises(Refused, match="this very machine"):
        rules(url, target, signed={"hub.example": [host]}).check(target, url)
    rules(url, own={"hub.example": [host]}).check(target, url)


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "192.168.1.1", "100.64.0.1"])
def test_the_networks_word_alone_sends_no_redirect_to_a_private_address(address: str) -> None:
    url, target = "https://hub.example/x", f"https://{address}/x"
    with pytest.raises(Refused, match="private address"):
        rules(url, signed={"hub.example": [address]}).check(target, url)
    rules(url, own={"hub.example": [address]}).check(target, url)


@WAYS
def test_a_hub_that_redirects_to_its_cdn_is_followed_as_far_as_the_rules_go(tmp_path: Path, settings: FetchSettings, data: bytes) -> None:
    with HostileServer() as hub, HostileServer() as cdn:
        cdn.on("/y", honest(data))
        url = hub.on("/x", bad.redirect(f"http://localhost:{cdn.port}/y?X-Amz-Signature=hush"))
        recorder = EventRecorder()
        with fetched(tmp_path / "a", settings, want(data, url), recorder=recorder) as outcome:
            assert isinstance(outcome, FetchFailed)
            assert '[download] redirects = {"127.0.0.1" = ["localhost"]}' in outcome.error.message
        assert cdn.requests == []
        permitted = msgspec.structs.replace(settings, signed_redirects={"127.0.0.1": ("localhost",)})
        with fetched(tmp_path / "b", permitted, want(data, url)) as outcome:
            good(outcome, data)


# -- tokens ----------------------------------------------------------------------------------------


@WAYS
def test_a_token_goes_to_its_host_and_not_along_a_permitted_redirect(tmp_path: Path, settings: FetchSettings, data: bytes) -> None:
    with HostileServer() as hub, HostileServer() as cdn:
        cdn.on("/y", honest(data))
        url = hub.on("/x", guarded(bad.redirect(f"http://localhost:{cdn.port}/y")))
        known = msgspec.structs.replace(settings, credentials=bearer(tmp_path), signed_redirects={"127.0.0.1": ("localhost",)})
        with fetched(tmp_path / "s", known, want(data, url)) as outcome:
            good(outcome, data)
        assert hub.requests[0].headers["authorization"] == f"Bearer {TOKEN}"
        assert cdn.requests
        assert all("authorization" not in it.headers for it in cdn.requests)


def test_a_token_does_not_follow_a_redirect_that_the_downloader_meets(tmp_path: Path) -> None:
    with HostileServer() as server, HostileServer() as other:
        other.on("/y", honest(DATA))
        url = server.on("/x", guarded(bad.on_probe(honest(DATA), bad.redirect(f"http://localhost:{other.port}/y"))))
        known = msgspec.structs.replace(FAST, credentials=bearer(tmp_path), signed_redirects={"127.0.0.1": ("localhost",)})
        with fetched(tmp_path / "s", known, want(DATA, url)) as outcome:  # a plain request is answered by the redirect, which is permitted
            good(outcome, DATA)
        assert other.requests
        assert all("authorization" not in it.headers for it in other.requests)


def test_a_download_with_a_token_is_not_shared_with_a_host_without_one(tmp_path: Path) -> None:
    with HostileServer() as server, HostileServer() as other:
        url = server.on("/x", guarded(honest(DATA, rate=20_000_000)))
        second = f"http://localhost:{other.port}/y"
        other.on("/y", honest(DATA, rate=20_000_000))
        known = msgspec.structs.replace(FAST, credentials=bearer(tmp_path))
        with fetched(tmp_path / "s", known, want(DATA, url, second)) as outcome:
            good(outcome, DATA)
        assert all("authorization" not in it.headers for it in other.requests)


def test_while_a_download_runs_the_secret_stands_in_no_file_and_no_argument(tmp_path: Path) -> None:
    seen: list[str] = []

    def look(it: Exchange) -> None:
        if not it.is_probe:
            for pid in [os.getpid(), *my_aria2()]:
                told = [name for name in ("cmdline", "environ") if TOKEN.encode() in Path(f"/proc/{pid}/{name}").read_bytes()]
                seen.extend(f"{pid} {name}" for name in told)
            seen.extend(str(path) for path in (tmp_path / "s").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes())
            seen.append("looked")
        honest(DATA)(it)

    with HostileServer() as server:
        url = server.on("/x", guarded(look))
        known = msgspec.structs.replace(FAST, credentials=bearer(tmp_path))
        with fetched(tmp_path / "s", known, want(DATA, url)) as outcome:
            good(outcome, DATA)
    assert set(seen) == {"looked"}


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "other.example", "127.0.0.1:1"])
def test_another_hosts_or_ports_token_is_not_sent(tmp_path: Path, host: str) -> None:
    with HostileServer() as server:
        known = msgspec.structs.replace(DIRECT, credentials=bearer(tmp_path, host))
        with fetched(tmp_path / "s", known, want(SHORT, server.on("/x", honest(SHORT)))) as outcome:
            good(outcome, SHORT)
        assert all("authorization" not in it.headers for it in server.requests)


def test_a_token_for_one_port_comes_before_the_hosts(tmp_path: Path) -> None:
    with HostileServer() as server:
        path = tmp_path / "other"
        path.write_text("ann:word")
        path.chmod(0o600)
        given = (CredentialSource(host="127.0.0.1", kind="basic", file=str(path)), *bearer(tmp_path, f"127.0.0.1:{server.port}"))
        known = msgspec.structs.replace(DIRECT, credentials=given)
        with fetched(tmp_path / "s", known, want(SHORT, server.on("/x", guarded(honest(SHORT))))) as outcome:
            good(outcome, SHORT)


def test_a_token_is_not_sent_in_the_clear(tmp_path: Path) -> None:
    known = credentials.read(None, bearer(tmp_path, "A.example."))
    assert known.header("https://a.example/x") == f"Bearer {TOKEN}"
    for url in ("http://a.example/x", "https://b.a.example/x", "https://a.example.evil/x", "https://xa.example/x"):
        assert known.header(url) is None
    assert TOKEN not in repr(vars(known))
    assert TOKEN not in known.text()


@pytest.mark.parametrize("text", ["", "two words", "töken", "a\x00b", "x" * 20_000])
def test_a_malformed_token_is_refused_without_being_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError) as refused:
        credentials.read(None, (CredentialSource(host="a.example", kind="bearer", file=token_file(tmp_path, text)),))
    assert not text or text not in refused.value.message


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    given = bearer(tmp_path)
    Path(given[0].file).chmod(0o640)
    with pytest.raises(SettingsError, match="can be read by others"):
        credentials.read(None, given)


def test_a_token_comes_from_the_environment_or_from_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = (CredentialSource(host="a.example", kind="bearer", variable="HUB_TOKEN"),)
    by_unit = (CredentialSource(host="a.example", kind="bearer", file="%d/token"),)
    for given in (by_name, by_unit):
        with pytest.raises(SettingsError):
            credentials.read(None, given)
    monkeypatch.setenv("HUB_TOKEN", TOKEN)
    token_file(tmp_path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    for given in (by_name, by_unit):
        assert credentials.read(None, given).header("https://a.example/") == f"Bearer {TOKEN}"


def test_a_bearer_token_is_not_sent_through_a_proxy(tmp_path: Path) -> None:
    with HostileServer() as proxy:
        proxy.on("/x", guarded(honest(DATA)))
        given = bearer(tmp_path, "models.invalid")
        through = msgspec.structs.replace(FAST, proxy=f"http://127.0.0.1:{proxy.port}", allow_http=True, credentials=given)
        with fetched(tmp_path / "s", through, want(DATA, "http://models.invalid/x")) as outcome:
            assert isinstance(outcome, FetchFailed)


# -- token services --------------------------------------------------------------------------------


class TokenService:
    """A registry at *registry* that asks for tokens of the service at *server*, and what the service was asked."""

    def __init__(self, server: HostileServer, host: str = "127.0.0.1", pair: str = "") -> None:
        self.realm = server.url("/token", host)
        self.asked: list[Exchange] = []
        expected = "Basic " + base64.b64encode(pair.encode()).decode() if pair else None

        def answer(it: Exchange) -> None:
            self.asked.append(it)
            if it.headers.get("authorization") != expected:
                bad.status(401)(it)
                return
            body = json.dumps({"token": TOKEN, "expires_in": 300}).encode()
            bad.with_length(body, len(body))(it)

        server.on("/token", answer)
        self.challenge = f'Bearer realm="{self.realm}",service="reg",scope="repository:a:pull"'


@WAYS
def test_a_registry_gives_a_blob_for_a_token_of_its_service(tmp_path: Path, settings: FetchSettings, data: bytes) -> None:
    with HostileServer() as registry:
        service = TokenService(registry)
        url = registry.on("/v2/a/blobs/x", guarded(honest(data), challenge=service.challenge))
        with fetched(tmp_path / "s", settings, want(data, url)) as outcome:
            good(outcome, data)
        assert len(service.asked) == 1


def test_a_token_service_gets_the_credentials_of_its_own_host_alone(tmp_path: Path) -> None:
    pair = tmp_path / "pair"
    pair.write_text("ann:word")
    pair.chmod(0o600)
    with HostileServer() as registry, HostileServer() as elsewhere:
        service = TokenService(elsewhere, "localhost")
        url = registry.on("/v2/a/blobs/x", guarded(honest(SHORT), challenge=service.challenge))
        given = (CredentialSource(host="127.0.0.1", kind="basic", file=str(pair)),)
        permitted = msgspec.structs.replace(DIRECT, credentials=given, signed_redirects={"127.0.0.1": ("localhost",)})
        with fetched(tmp_path / "s", permitted, want(SHORT, url)) as outcome:
            good(outcome, SHORT)
        assert service.asked
        assert all("authorization" not in it.headers for it in service.asked)


def test_a_token_service_that_no_rule_names_is_not_asked(tmp_path: Path) -> None:
    with HostileServer() as registry, HostileServer() as elsewhere:
        service = TokenService(elsewhere, "localhost")
        url = registry.on("/v2/a/blobs/x", guarded(honest(SHORT), challenge=service.challenge))
        with fetched(tmp_path / "s", DIRECT, want(SHORT, url)) as outcome:
            assert isinstance(outcome, FetchFailed)
        assert elsewhere.requests == []


def test_a_services_token_does_not_travel_to_where_the_registry_redirects(tmp_path: Path) -> None:
    with HostileServer() as registry, HostileServer() as cdn:
        service = TokenService(registry)
        cdn.on("/y", honest(SHORT))
        away = bad.redirect(f"http://localhost:{cdn.port}/y")
        url = registry.on("/v2/a/blobs/x", guarded(away, challenge=service.challenge))
        permitted = msgspec.structs.replace(DIRECT, signed_redirects={"127.0.0.1": ("localhost",)})
        with fetched(tmp_path / "s", permitted, want(SHORT, url)) as outcome:
            good(outcome, SHORT)
        assert all("authorization" not in it.headers for it in cdn.requests)


@pytest.mark.parametrize(
    "header",
    [
        "", "Basic realm=x", "Bearer", "Bearer realm=", 'Bearer realm="ftp://a.example/t"', 'Bearer realm="/token"',
        'Bearer service="https://a.example/"', "Bearer " + 'x="' * 5000,
    ],
)  # fmt: skip
def test_a_challenge_that_names_no_service_is_none(header: str) -> None:
    assert token_service.challenge_of("https://r.example/v2/", header) is None


def test_a_service_is_asked_for_what_the_challenge_names() -> None:
    found = token_service.challenge_of(
        "https://r.example/v2/", 'Bearer realm="https://a.example/t?x=1",service="r e&g",scope="repository:a:pull"'
    )
    assert found
    assert parse_qs(urlsplit(found.url).query) == {"x": ["1"], "service": ["r e&g"], "scope": ["repository:a:pull"]}


def test_a_service_in_the_clear_on_another_machine_is_refused() -> None:
    with pytest.raises(Refused):
        token_service.challenge_of("https://r.example/v2/", 'Bearer realm="http://a.example/token"')


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"token": 1}', b'{"token": "a b"}', b'{"token": "a\\r\\nX: y"}', b'{"token": ""}'])
def test_an_answer_without_a_token_is_refused(data: bytes) -> None:
    with pytest.raises(Refused, match="no token"):
        token_service.token_in(data)


def test_a_token_is_for_what_it_was_given_for_until_it_ends() -> None:
    now = [0.0]
    tokens = token_service.Tokens(clock=lambda: now[0])
    one, other = (token_service.challenge_of(f"https://{host}/v2/", 'Bearer realm="https://a.example/t"') for host in ("r", "s"))
    assert one
    assert other
    tokens.keep(one, TOKEN, 100.0)
    assert (tokens.known(one), tokens.known(other)) == (TOKEN, "")
    now[0] = 81.0
    assert tokens.known(one) == ""
    assert TOKEN not in repr(tokens)


# -- documents, and what an operator's tools read --------------------------------------------------


def test_a_document_is_fetched_with_its_hosts_token_and_the_way_is_noted(tmp_path: Path) -> None:
    known = credentials.read(None, bearer(tmp_path))
    with HostileServer() as hub, HostileServer() as cdn:
        cdn.on("/y", honest(SHORT))
        target = f"http://localhost:{cdn.port}/y"
        url = hub.on("/x", guarded(bad.redirect(target)))
        visited: list[str] = []
        with http.opened(url, timeout_seconds=5, authorize=known.header, visited=visited) as answer:
            assert b"".join(http.chunks(answer, url, max_bytes=1 << 20)) == SHORT
        assert visited == [target]
        assert all("authorization" not in it.headers for it in cdn.requests)


# -- mirrors ---------------------------------------------------------------------------------------


def mirror(server: HostileServer) -> str:
    return server.url("/{algorithm}/{hex:2}/{hex}")


def path_of(data: bytes) -> str:
    digits = want(data).digest.partition(":")[2]
    return f"/sha256/{digits[:2]}/{digits}"


@WAYS
def test_a_mirror_is_asked_first_and_alone(tmp_path: Path, settings: FetchSettings, data: bytes) -> None:
    with HostileServer() as own, HostileServer() as origin:
        own.on(path_of(data), honest(data))
        url = origin.on("/x", honest(data))
        with fetched(tmp_path / "s", msgspec.structs.replace(settings, mirrors=(mirror(own),)), want(data, url)) as outcome:
            good(outcome, data)
        assert origin.requests == []


@WAYS
@pytest.mark.parametrize("behaviour", [bad.status(404), bad.status(503), honest(b"x" * 2_000), bad.redirect("https://evil.example/x")])
def test_what_a_mirror_does_not_give_comes_from_the_sources(
    tmp_path: Path, settings: FetchSettings, data: bytes, behaviour: Behaviour
) -> None:
    with HostileServer() as own, HostileServer() as origin:
        own.on(path_of(data), behaviour)
        url = origin.on("/x", honest(data))
        with fetched(tmp_path / "s", msgspec.structs.replace(settings, mirrors=(mirror(own),)), want(data, url)) as outcome:
            good(outcome, data)
        assert own.requests
