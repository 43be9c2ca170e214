"""Which URLs, hosts, addresses and answers pass."""

from __future__ import annotations

import ipaddress

import msgspec
import pytest

from reconciler.fetch import sources
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.sources import Refused, Rules
from reconciler.ports import Want

DIGEST = "sha256:" + "ab" * 32


def rules(*urls: str, **settings: object) -> Rules:
    return sources.rules([Want(digest=DIGEST, size=1, sources=urls)], msgspec.convert(settings, FetchSettings))


def test_sources_come_first_then_the_nodes_own_each_once() -> None:
    want = Want(digest=DIGEST, size=1, sources=("https://a/1", "https://b/2", "https://a/1"))
    found = sources.order(want, ("https://m/{algorithm}/{hex}", "https://b/2"))
    assert found == ("https://a/1", "https://b/2", f"https://m/sha256/{'ab' * 32}")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://a.example/x", "data:,x", "gopher://a.example/", "HTTPS:a.example", "//a.example/x", "https:///x",
        "https://user@a.example/x", "https://user:word@a.example/x", "https://a.example\\@b.example/x", "https://a.example/x#y",
        "https://a.example:99999/x", "https://a.example/\x00", "https://a.example/ x", "https://a%2eexample/x", "",
        "https://b.example/x", "https://a.example.evil.example/x", "https://evil.example/a.example",
        "http://a.example/x",
    ],
)  # fmt: skip
def test_a_url_that_is_not_plainly_permitted_is_refused(url: str) -> None:
    with pytest.raises(Refused):
        rules("https://a.example/x").check(url)


def test_hosts_are_those_that_sources_and_fallbacks_name() -> None:
    found = rules("https://A.example/x", fallback=["https://m.example/{hex}"])
    found.check("https://a.example./y")
    found.check("https://m.example/y")
    with pytest.raises(Refused, match="not among the allowed hosts"):
        found.check("https://c.example/y")


def test_allowed_hosts_replace_what_sources_name() -> None:
    found = rules("https://a.example/x", allowed_hosts=["cdn.example"])
    found.check("https://cdn.example/x")
    with pytest.raises(Refused, match="not among the allowed hosts"):
        found.check("https://a.example/x")


def test_plain_http_goes_to_loopback_alone() -> None:
    for url in ("http://127.0.0.1:80/x", "http://localhost/x", "http://[::1]/x"):
        rules(url).check(url)
    rules("http://a.example/x", allow_http=True).check("http://a.example/x")
    for url in ("http://a.example/x", "http://127.0.0.1.evil.example/x", "http://127.1/x", "http://2130706433/x", "http://0x7f000001/x"):
        with pytest.raises(Refused):
            rules(url).check(url)


PRIVATE = [
    "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "127.0.0.1", "::1", "fe80::1", "fd00::1", "::ffff:10.0.0.1",
    "::ffff:169.254.169.254", "64:ff9b::a00:1", "64:ff9b::7f00:1", "2002:a00:1::1", "192.0.0.1", "198.18.0.1", "240.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_that_leads_to_a_private_address_is_refused(address: str) -> None:
    with pytest.raises(Refused, match="private address"):
        rules("https://a.example/x").check_address("a.example", ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PRIVATE)
def test_the_settings_may_name_a_private_host(address: str) -> None:
    rules("https://a.example/x", allowed_hosts=["a.example"]).check_address("a.example", ipaddress.ip_address(address))
    rules("https://a.example/x", fallback=["https://a.example/{hex}"]).check_address("a.example", ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "::ffff:0.0.0.0"])
def test_what_is_no_hosts_address_is_refused_even_then(address: str) -> None:
    with pytest.raises(Refused, match="no host's address"):
        rules("https://a.example/x", allowed_hosts=["a.example"]).check_address("a.example", ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822"])
def test_public_addresses_pass(address: str) -> None:
    rules("https://a.example/x").check_address("a.example", ipaddress.ip_address(address))


def test_the_networks_word_alone_reaches_no_private_literal() -> None:
    for url in ("https://10.0.0.1/x", "https://169.254.169.254/latest", "https://[fd00::1]/x"):
        with pytest.raises(Refused):
            rules(url).check(url)


def headers(**values: str) -> dict[str, list[str]]:
    return {name.replace("_", "-"): [value] for name, value in values.items()}


def test_good_answers() -> None:
    assert sources.check_answer(206, headers(content_range="bytes 0-0/10", content_length="1"), 10) == sources.Answer(ranges=True, body=1)
    assert sources.check_answer(206, headers(content_range="bytes 0-9/*"), 10) == sources.Answer(ranges=True, body=10)
    assert sources.check_answer(200, headers(content_length="10"), 10) == sources.Answer(ranges=False, body=10)
    assert sources.check_answer(200, headers(content_encoding="identity"), 10) == sources.Answer(ranges=False, body=-1)


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (200, headers(content_length="11"), "size-mismatch"),
        (200, headers(content_length="9"), "size-mismatch"),
        (206, headers(content_range="bytes 0-0/11"), "size-mismatch"),
        (200, headers(content_length="-1"), "source-failed"),
        (200, headers(content_length="+10"), "source-failed"),
        (200, headers(content_length="١٠"), "source-failed"),
        (200, headers(content_length="1" * 99), "source-failed"),
        (200, headers(content_length="10", transfer_encoding="chunked"), "source-failed"),
        (200, {"content-length": ["10", "11"]}, "source-failed"),
        (200, headers(content_encoding="gzip"), "source-failed"),
        (206, {}, "source-failed"),
        (206, headers(content_range="bytes 1-1/10"), "source-failed"),
        (206, headers(content_range="bytes 0-10/*"), "source-failed"),
        (206, headers(content_range="bytes 0-0/10", content_length="2"), "source-failed"),
        (206, headers(content_range="bytes 0-0/10", content_type="multipart/byteranges"), "source-failed"),
        (204, {}, "source-failed"),
    ],
)
def test_bad_answers(status: int, said: dict[str, list[str]], kind: str) -> None:
    with pytest.raises(Refused) as caught:
        sources.check_answer(status, said, 10)
    assert caught.value.failure.kind == kind


@pytest.mark.parametrize(
    ("status", "permanent"), [(401, True), (403, True), (404, True), (416, True), (429, False), (500, False), (503, False)]
)
def test_which_refusals_are_final(status: int, permanent: bool) -> None:
    assert sources.failure_of_status(status, {}, 0.0).permanent is permanent


@pytest.mark.parametrize("now", [0.0, 60.0, 1e9, 9e9])
def test_retry_after_is_counted_from_the_servers_own_date_whatever_the_clock_says(now: float) -> None:
    answer = headers(retry_after="Thu, 01 Jan 1970 00:02:00 GMT", date="Thu, 01 Jan 1970 00:01:30 GMT")
    assert sources.failure_of_status(503, answer, now).retry_after == 30


def test_retry_after_in_seconds_and_as_a_date() -> None:
    assert sources.failure_of_status(429, headers(retry_after="120"), 0.0).retry_after == 120
    assert sources.failure_of_status(404, headers(retry_after="120"), 0.0).retry_after == 0
    assert sources.retry_after("Thu, 01 Jan 1970 00:02:00 GMT", 60.0) == 60
    assert sources.retry_after("Thu, 01 Jan 1970 00:02:00 GMT", 1e9) == 0
    assert sources.retry_after("9" * 18, 0.0) == 86400
    for nonsense in ("", "soon", "-5", "1.5", "\x00"):
        assert sources.retry_after(nonsense, 0.0) == 0


@pytest.mark.parametrize(
    "location",
    [
        "", "http:\\\\evil.example", "https://a.example/\x00", "https://a.example/\r\nX: y", "https://exämple.example/", "https://[/",
        "x" * 9000,
    ],
)  # fmt: skip
def test_a_redirect_to_what_is_no_url_is_refused(location: str) -> None:
    with pytest.raises(Refused):
        rules("https://a.example/x").check(sources.redirect_target("https://a.example/x", {"location": [location]}))


def test_relative_redirects() -> None:
    assert sources.redirect_target("https://a.example/x/y?z", {"location": ["../w"]}) == "https://a.example/w"
    assert sources.redirect_target("https://a.example/x", {"location": ["//b.example/w#part"]}) == "https://b.example/w"


def test_people_see_no_secret_and_no_control_character() -> None:
    assert sources.redact("https://user:word@a.example:8/x?token=hush#f") == "https://a.example:8/x?…"
    assert sources.redact("https://[/user:word@x?hush") == "x"
    assert "\x1b" not in sources.clean("\x1b[31m\u202e\n")
    assert len(sources.clean("x" * 999)) == 201


def test_credentials_travel_over_tls_or_stay_on_the_machine() -> None:
    assert sources.may_authorize("https://a.example/")
    assert sources.may_authorize("http://127.0.0.1:8/")
    assert not sources.may_authorize("http://a.example/")
    assert not sources.may_authorize("http://127.1/")
