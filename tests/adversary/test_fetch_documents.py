"""Signed documents over HTTP: what a server, a proxy or a login page may do, and what a node makes of it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.core import file_type
from reconciler.core.errors import FetchError, TooLarge
from reconciler.fetch import error_pages, http
from tests import hostile_server as bad
from tests.adversary.test_sources_tls import Authority
from tests.fetching import HUNG_SECONDS
from tests.hostile_server import Behaviour, Exchange, HostileServer
from tests.node import Node, tiny
from tests.node import run as command

ENVELOPE = json.dumps({"payloadType": "application/vnd.reconciler.snapshot.v1+json", "payload": "e30=", "signatures": []}).encode()


@pytest.fixture
def hostile() -> Iterator[HostileServer]:
    with HostileServer() as made:
        yield made


def get(url: str, **options: object) -> http.Document:
    """Fetch *url*, within the test's own time: one that hangs fails."""
    found: list[http.Document | BaseException] = []

    def run() -> None:
        try:
            found.append(http.get(url, **{"max_bytes": 1 << 20, "timeout_seconds": 1.0} | options))  # type: ignore[arg-type]
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HUNG_SECONDS / 3)
    if not found:
        pytest.fail("the fetch does not end")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def sends(data: bytes, content_type: str = "application/json", status: int = 200) -> Behaviour:
    def behave(it: Exchange) -> None:
        it.head(status, ("Content-Type", content_type), ("Content-Length", len(data)))
        it.body(data)

    return behave


# -- addresses -------------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names and the addresses that they lead to, one look-up after the other; a public address leads to this machine after all."""
    known: dict[str, list[str]] = {}
    look_up, connect = socket.getaddrinfo, socket.create_connection

    def lead(host: str, port: int, *args: object, **kwargs: object) -> object:
        answers = known.get(host)
        address = (answers.pop(0) if len(answers) > 1 else answers[0]) if answers else host
        return look_up(address, port, *args, **kwargs)  # type: ignore[arg-type]

    def reach(place: tuple[str, int], *args: object, **kwargs: object) -> object:
        public = place[0].startswith("93.")
        return connect(("127.0.0.1" if public else place[0], place[1]), *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", lead)
    monkeypatch.setattr(socket, "create_connection", reach)
    return known


def test_a_name_that_leads_elsewhere_at_the_second_look_up_gains_nothing(hostile: HostileServer, names: dict[str, list[str]]) -> None:
    names["config.example"] = ["93.184.216.34", "10.0.0.1"]
    hostile.on("/s.json", sends(ENVELOPE))

    assert get(f"http://config.example:{hostile.port}/s.json", allow_http=True).data == ENVELOPE
    assert len(names["config.example"]) == 1, "it was looked up once"


@pytest.mark.parametrize(
    "away", ["http://127.0.0.1:{port}/x", "http://localhost:{port}/x", "http://inside.example:{port}/x", "http://[::1]:{port}/x"]
)
def test_a_redirect_from_a_public_address_to_a_private_one_is_not_followed(
    hostile: HostileServer, names: dict[str, list[str]], away: str
) -> None:
    names |= {"config.example": ["93.184.216.34"], "inside.example": ["127.0.0.1"]}
    hostile.on("/s.json", bad.redirect(away.format(port=hostile.port)))
    hostile.on("/x", sends(ENVELOPE))

    with pytest.raises(FetchError, match="from a public address to"):
        get(f"http://config.example:{hostile.port}/s.json", allow_http=True)
    assert hostile.asked("/x") == []


def test_an_operators_own_private_server_may_redirect_to_another(hostile: HostileServer, names: dict[str, list[str]]) -> None:
    names |= {"config.internal": ["127.0.0.1"], "files.internal": ["127.0.0.1"]}
    hostile.on("/s.json", bad.redirect(f"http://files.internal:{hostile.port}/x"))
    hostile.on("/x", sends(ENVELOPE))

    assert get(f"http://config.internal:{hostile.port}/s.json", allow_http=True).data == ENVELOPE


def test_an_address_that_is_no_hosts_is_not_asked(names: dict[str, list[str]]) -> None:
    names["config.example"] = ["0.0.0.0"]

    with pytest.raises(FetchError, match="no host's address"):
        get("https://config.example/s.json")


@pytest.mark.parametrize("to", ["https://user:hush@127.0.0.1/x", "file:///etc/passwd", "http://models.example.org/x", "", "//", "ftp://x/"])
def test_a_redirect_to_what_is_not_allowed_is_not_followed(hostile: HostileServer, to: str) -> None:
    url = hostile.on("/s.json", bad.redirect(to))

    with pytest.raises(FetchError) as caught:
        get(url)
    assert "hush" not in caught.value.message


# -- time and size ---------------------------------------------------------------------------------


def drip_body(it: Exchange) -> None:
    it.head(200, ("Content-Length", 1 << 20))
    while True:
        it.send(b" ")
        it.server.rest(0.05)


def drip_after_a_redirect(it: Exchange) -> None:
    bad.slow_headers(it) if it.nth else bad.redirect(it.path)(it)


@pytest.mark.parametrize(
    "behaviour", [bad.silent, bad.slow_headers, drip_body, drip_after_a_redirect], ids=["silent", "headers", "body", "redirect"]
)
def test_whoever_drips_bytes_meets_the_deadline(hostile: HostileServer, behaviour: Behaviour) -> None:
    url = hostile.on("/s.json", behaviour)

    with pytest.raises(FetchError):
        get(url)


@pytest.mark.parametrize("behaviour", [bad.endless, sends(b"{" + b" " * (2 << 20))], ids=["chunked", "sized"])
def test_more_than_the_cap_is_cut_off(hostile: HostileServer, behaviour: Behaviour) -> None:
    url = hostile.on("/s.json", behaviour)

    with pytest.raises(TooLarge):
        get(url, timeout_seconds=30.0)


@pytest.mark.parametrize(
    "behaviour",
    [bad.garbage, bad.huge_header, bad.gzipped(ENVELOPE), bad.with_length(ENVELOPE, len(ENVELOPE) + 9), bad.status(204), bad.status(206)],
    ids=["no-http", "huge-header", "compressed", "cut", "204", "206"],
)
def test_an_answer_that_is_no_document_is_the_networks_fault(hostile: HostileServer, behaviour: Behaviour) -> None:
    with pytest.raises(FetchError):
        get(hostile.on("/s.json", behaviour))


def test_a_body_without_a_length_is_a_document(hostile: HostileServer) -> None:
    assert get(hostile.on("/a", bad.ancient(ENVELOPE))).data == ENVELOPE
    assert get(hostile.on("/b", bad.chunked(ENVELOPE))).data == ENVELOPE


def test_what_an_etag_names_is_not_sent_again(hostile: HostileServer) -> None:
    def behave(it: Exchange) -> None:
        bad.status(304)(it) if it.headers.get("if-none-match") == '"one"' else bad.honest(ENVELOPE, etag="one")(it)

    url = hostile.on("/s.json", behave)

    assert get(url).etag == '"one"'
    assert get(url, etag='"one"') == http.Document(data=None, etag='"one"')


# -- proxies and certificates ----------------------------------------------------------------------


def test_a_proxy_knows_names_that_we_do_not_and_is_told_its_password(hostile: HostileServer) -> None:
    hostile.on("/s.json", sends(ENVELOPE))

    found = get("http://config.invalid/s.json", allow_http=True, proxy=f"http://ann:word@127.0.0.1:{hostile.port}")

    assert found.data == ENVELOPE
    assert hostile.requests[0].headers["proxy-authorization"] == "Basic YW5uOndvcmQ="
    assert hostile.requests[0].headers["host"] == "config.invalid"


def test_https_goes_through_the_proxy_as_a_tunnel(hostile: HostileServer) -> None:
    with pytest.raises(FetchError, match="Tunnel connection failed"):
        get("https://config.invalid/s.json", proxy=f"http://ann:word@127.0.0.1:{hostile.port}")
    assert [(it.method, it.headers.get("proxy-authorization")) for it in hostile.requests] == [("CONNECT", "Basic YW5uOndvcmQ=")]


def test_the_environments_proxy_is_used_where_the_settings_name_none(hostile: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{hostile.port}")
    monkeypatch.setenv("no_proxy", "direct.invalid")
    hostile.on("/s.json", sends(ENVELOPE))

    assert get("http://config.invalid/s.json", allow_http=True).data == ENVELOPE
    with pytest.raises(FetchError):
        get("http://direct.invalid/s.json", allow_http=True)


def test_this_machine_is_not_reached_through_a_proxy(hostile: HostileServer) -> None:
    assert get(hostile.on("/s.json", sends(ENVELOPE)), proxy="http://127.0.0.1:1").data == ENVELOPE


@pytest.mark.parametrize(
    ("trusted", "days", "host"), [(True, 10, "127.0.0.1"), (False, 10, "127.0.0.1"), (True, -5, "127.0.0.1"), (True, 10, "x.example")]
)
def test_only_a_certificate_that_holds_is_taken(tmp_path: Path, trusted: bool, days: int, host: str) -> None:
    authority = Authority(tmp_path)
    with HostileServer(tls=authority.server(days=days, host=host)) as hostile:
        url = hostile.on("/s.json", sends(ENVELOPE))
        if trusted and days > 0 and host == "127.0.0.1":
            assert get(url, ca_file=str(authority.file)).data == ENVELOPE
            return
        with pytest.raises(FetchError, match="cannot fetch"):
            get(url, ca_file=str(authority.file) if trusted else "")
        assert hostile.requests == []


# -- pages in place of documents -------------------------------------------------------------------

LOGIN = (
    b"<!DOCTYPE html>\n<html><head><title>Sign in \x1b[31m&amp; go on\n</title><script>var token</script></head>"
    b"<body>Please log in</body></html>"
)
S3 = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message>'
    b"<RequestId>1</RequestId></Error>"
)
PAGES = {
    "login page": (LOGIN, "text/html; charset=utf-8", 'web page ("Sign in \\x1b[31m& go on"): a login page or a proxy?'),
    "login page under another type": (LOGIN, "application/json", "web page"),
    "page without a head": (b"<h1>502 Bad Gateway</h1>nginx", "text/html", 'web page ("502 Bad Gateway")'),
    "page that says its type alone": (b"Please log in", "text/html", 'web page ("Please log in")'),
    "bucket": (S3, "application/xml", 'XML page ("AccessDenied: Access Denied")'),
    "registry": (
        b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required","detail":null}]}', "application/json",
        'error of the service ("UNAUTHORIZED; authentication required")',
    ),
    "hub": (b'{"error":"Repository not found"}', "application/json", 'error of the service ("Repository not found")'),
    "problem details": (b'{"type":"about:blank","title":"Forbidden","detail":"no way"}', "application/problem+json", "no way"),
    "gateway": (b'{"message":"missing authentication token"}', "application/json", "missing authentication token"),
    "plain text": (b"upstream connect error\r\nreset", "text/plain", 'no JSON object ("upstream connect error reset")'),
    "list": (b"[]", "application/json", "no JSON object"),
    "compressed file": (b"\x1f\x8b\x08\x00payload", "application/octet-stream", "no JSON object"),
    "nothing": (b"", "application/json", "empty page"),
    "deep nesting": (b'{"error":' * 5000, "application/json", None),
}  # fmt: skip


@pytest.mark.parametrize(("data", "content_type", "said"), PAGES.values(), ids=PAGES)
def test_a_page_in_place_of_a_document_is_named(hostile: HostileServer, data: bytes, content_type: str, said: str | None) -> None:
    url = hostile.on("/s.json", sends(data, content_type))

    if said is None:
        assert get(url).data == data
        return
    with pytest.raises(FetchError) as caught:
        get(url)
    assert said in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("status", [401, 403, 404, 407, 500, 502, 503])
def test_a_refusal_is_quoted(hostile: HostileServer, status: int) -> None:
    url = hostile.on("/s.json", sends(S3, "application/xml", status))

    with pytest.raises(FetchError, match=f"answered {status} .*AccessDenied: Access Denied"):
        get(url)


def test_a_refusal_whose_page_never_ends_is_a_refusal(hostile: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(it: Exchange) -> None:
        it.head(403, ("Content-Type", "text/html"))
        while True:
            it.send(b"<p>" * 1000)

    monkeypatch.setattr(http, "_PAGE_SECONDS", 0.2)
    with pytest.raises(FetchError, match="answered 403"):
        get(hostile.on("/s.json", behave))


@pytest.mark.parametrize(
    "data",
    [
        ENVELOPE, b"\xef\xbb\xbf" + ENVELOPE, b"\r\n " + ENVELOPE, ENVELOPE[:-9], b'{"payload": "<html>", "error": "x"}',
        b'{"signatures": 1}', b'{"payloadType": "', b'{"schema": 1, "network": "n"}', b"{", b'{"x": "error"}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("content_type", ["application/json", "text/html", "text/plain", "binary/octet-stream", ""])
def test_what_is_meant_as_an_envelope_is_judged_by_its_signatures(hostile: HostileServer, data: bytes, content_type: str) -> None:
    """Whatever its type, and however malformed: a bad envelope is refused as one, and never called a page."""
    assert get(hostile.on("/s.json", sends(data, content_type))).data == data


@pytest.fixture
def online_node(node: Node, hostile: HostileServer) -> Node:
    """Return a node that has a lock, and whose network is the hostile server from now on."""
    node.publish()
    envelope = (node.folder / "published.json").read_bytes()
    hostile.on("/snapshot.json", sends(envelope, "text/html"))
    text = (node.folder / "reconcile.toml").read_text()
    addresses = f'"{hostile.url("/snapshot.json")}"\nroot_updates = "{hostile.url("/{version}.root.json")}"'
    (node.folder / "reconcile.toml").write_text(text.replace('"published.json"', addresses))
    assert node.run("sync").code == 0
    return node


@pytest.mark.parametrize("page", ["login page", "bucket", "registry", "plain text", "nothing"])
def test_a_node_behind_a_login_page_is_a_node_without_a_network(online_node: Node, hostile: HostileServer, page: str) -> None:
    data, content_type, _ = PAGES[page]
    lock = (online_node.folder / "models.lock").read_bytes()
    hostile.on("/snapshot.json", sends(data, content_type))
    hostile.on("/2.root.json", sends(data, content_type))

    locked = online_node.run("lock", "--json")
    synced = online_node.run("sync")

    assert (locked.code, locked.json["error"]["name"]) == (1, "source-failed")
    assert "the lock that was accepted last stays in use" in synced.out + synced.err
    assert synced.code == 0
    assert (online_node.folder / "models.lock").read_bytes() == lock
    assert not set(online_node.kinds()) & {"bad-envelope", "bad-signature"}


def test_a_login_page_in_place_of_a_blob_is_no_fault_of_the_model_or_the_source(node: Node, hostile: HostileServer) -> None:
    small, large = tiny("a"), tiny("a") + bytes(1 << 20)
    items = [
        node.item(name, data, serve=False, urls=[hostile.on(f"/{name[0]}", bad.login_page)])
        for name, data in (("a:v1", small), ("b:v1", large))
    ]
    node.publish(*items)

    assert node.run("apply").code == 3

    assert set(node.kinds()) == {"source-failed"}
    assert not node.records(), "nothing is in quarantine"
    assert "a login page or a proxy?" in node.run("incidents").out


def test_a_login_page_in_place_of_a_root_does_not_hide_the_snapshot(online_node: Node, hostile: HostileServer) -> None:
    hostile.on("/2.root.json", sends(LOGIN, "text/html"))
    (online_node.folder / "next.json").write_bytes(online_node.network.snapshot())
    hostile.on("/snapshot.json", sends((online_node.folder / "next.json").read_bytes()))

    ran = online_node.run("lock", "--json")

    assert ran.code == 0, ran
    assert "version = 2" in (online_node.folder / "models.lock").read_text()


def test_a_root_that_is_fetched_by_hand_says_that_a_page_stands_there(online_node: Node, hostile: HostileServer) -> None:
    url = hostile.on("/2.root.json", sends(LOGIN, "text/html"))

    ran = command("trust", "update", url, "--config", str(online_node.folder / "reconcile.toml"))

    assert ran.code == 1, ran
    assert "source-failed" in ran.err
    assert "a login page or a proxy?" in ran.err


@pytest.mark.parametrize("damaged", [b'{"payload": "e30="}', ENVELOPE, ENVELOPE[:-5], b'{"schema": 1}'])
def test_a_malformed_envelope_is_refused_as_one(online_node: Node, hostile: HostileServer, damaged: bytes) -> None:
    hostile.on("/snapshot.json", sends(damaged))

    ran = online_node.run("sync", "--json")

    assert ran.code == 4
    assert json.loads(ran.out.splitlines()[-1])["error"]["name"] in {"bad-envelope", "bad-signature"}


@pytest.mark.parametrize("part", ["<!---->", "<!-- --> <!--", "<title>", "<title ", "<h1", "<script>", "<style", "<!--", "< "])
def test_a_page_that_is_made_to_be_read_for_ever_is_read_at_once(part: str) -> None:
    data = part.encode() * (error_pages.MOST_BYTES // len(part)) + b"x"
    assert len(error_pages.describe("text/html", data)) < 400
    assert len(file_type.identify(data[: file_type.HEAD_BYTES], len(data)).text) < 400
