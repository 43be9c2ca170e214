"""
What a signer could write into a snapshot's names, paths, digests, URLs and numbers, to be one thing here and another elsewhere.

Every payload is decoded as it stands, as if it were signed: what is refused here never reaches a path join, a URL, a terminal or another
reader of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.core import digest, snapshot, strict_json, urls
from reconciler.core.errors import BadEnvelope
from tests.network import Document, Network, compact

NETWORK = Network()
HEX = "0" * 64


def document(**changes: Any) -> Document:
    """Return a good snapshot's payload with *changes* in its one model."""
    made = {key: changes.pop(key) for key in ("path", "urls") if key in changes}
    return NETWORK.snapshot_document(NETWORK.model("a:v1", **made) | changes)


def artifact(**changes: Any) -> Document:
    found: Document = document()["models"][0]["artifacts"][0]
    return found | changes


def refused(payload: bytes | Document) -> str:
    """Decode, expect a refusal, and return its message, which is fit for a terminal."""
    with pytest.raises(BadEnvelope) as caught:
        snapshot.decode(payload if isinstance(payload, bytes) else compact(payload))
    assert caught.value.message.isprintable(), ascii(caught.value.message)
    assert len(caught.value.message) < 6000
    return caught.value.message


def test_the_document_that_is_changed_below_is_a_good_one() -> None:
    assert snapshot.decode(compact(document())).models[0].id == "a:v1"


# -- names

BAD_NAMES = [
    "", ".", "..", "-a", "_a", ".a", "A", "a/b", "a\\b", "a:b", "a b", "a\n", "\na", "a\0", "a\x1b", "é", "а", "a\u0301", "٣", "a٣", "ａ",
    "a" * 129, "a%2e",
    "a?b", "a#b", "~", "*",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_is_of_its_alphabet_alone(name: str) -> None:
    assert "name" in refused(document(name=name))
    assert "network" in refused(document() | {"network": name})
    assert "engine" in refused(document(runtime={"engine": name}))


@pytest.mark.parametrize("version", ["", ".", "..", "../v", "-1", "v/1", "v\n", "v 1", "v" * 65, "١", "v\0", "v:1", "é"], ids=ascii)
def test_a_version_is_of_its_alphabet_alone(version: str) -> None:
    assert "version" in refused(document(version=version))


@pytest.mark.parametrize("pair", [("a:v1", "a:v1"), ("a:v1", "a:V1"), ("a:vx", "a:vX")])
def test_no_two_models_share_an_id_on_any_disk(pair: tuple[str, str]) -> None:
    assert "duplicate id" in refused(NETWORK.snapshot_document(*map(NETWORK.model, pair)))


# -- paths

BAD_PATHS = [
    "", "/", "/a", "//a", "a/", "a//b", ".", "./a", "a/.", "a/./b", "..", "../a", "a/..", "a/../b", "a\\b", "\\a", "..\\a", "C:\\a",
    "a\0b", "a\nb", "a\rb", "a\tb",
    "a\x1b[0m", "a\x7f", "a\x85b", "a\u200bb", "a\u200db", "a\u202eb", "a\u2066b", "a\u2028b", "a\u2029b", "\ufeffa", "a\u00adb",
    "e\u0301", "\u212a", "\u2126",
    "ﬁ\u0301\u0323", "a\U000e0001", "x" * 256, "é" * 128, "x/" * 512 + "x", "é/" * 342,
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: ascii(path)[:24])
def test_a_path_means_the_same_everywhere(path: str) -> None:
    refused(document(artifacts=[artifact(path=path)], entrypoint="a.gguf"))
    refused(document(entrypoint=path))


@pytest.mark.parametrize(
    "path", ["a", "a/b", "...", "a..b", "..a", "é", "名前/模型", "a b", "-rf", "~", "a:b", "x" * 255, "/".join(["x" * 203] * 5)]
)
def test_a_path_that_is_merely_odd_is_a_path(path: str) -> None:
    assert snapshot.decode(compact(document(path=path))).models[0].entrypoint == path


@pytest.mark.parametrize(
    "paths", [("a", "a"), ("a", "A"), ("straße", "STRASSE"), ("ſ", "s"), ("a", "a/b"), ("a/b", "A"), ("A/b", "a/b"), ("a/b/c/d", "a/b")]
)
def test_no_two_artifacts_meet_on_any_disk(paths: tuple[str, str]) -> None:
    for order in (paths, paths[::-1]):
        refused(document(artifacts=[artifact(path=path) for path in order], entrypoint=order[0]))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_what_passes_for_a_path_stays_below_the_folder_it_is_joined_to(path: str) -> None:
    try:
        snapshot.check_path(path)
    except ValueError:
        return
    components = path.split("/")
    assert not {"", ".", ".."} & set(components)
    assert path.isprintable() or not any(ord(character) < 32 for character in path)
    assert "\0" not in path
    assert path.encode().decode() == path


# -- digests

BAD_DIGESTS = [
    "", HEX, f"sha256:{HEX[1:]}", f"sha256:{HEX}0", f"sha256:{'A' * 64}", f"SHA256:{HEX}", f"Sha256:{HEX}", f"sha256:{HEX}\n",
    f"\nsha256:{HEX}", f"sha256: {HEX}",
    f"sha256:{HEX[1:]} ", f"sha256:{HEX[2:]}0x", f"sha256-{HEX}", f"sha256:{'٠' * 64}", f"sha256:{'０' * 64}", f"sha256:{HEX[1:]}g",
    f"sha256:../{HEX[3:]}",
    f"sha256:{HEX}/..", f"md5:{HEX[:31]}", f"sha/1:{HEX}", f"sha512:{HEX}", f"sha256:{HEX}{HEX}", f"../blake2b:{HEX}{HEX}",
    f"sha256:sha256:{HEX}", f"sha256:{HEX}\0",
    f"sha256:{HEX[:63]}\u0661", f"sha256:{HEX[:63]}²", f"sha256\n:{HEX}", f":{HEX}", "sha256:",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_DIGESTS, ids=lambda text: ascii(text)[:28])
def test_a_digest_is_exactly_one(text: str) -> None:
    assert "digest" in refused(document(artifacts=[artifact(digest=text)], entrypoint="a.gguf"))
    assert not digest.is_digest(text)
    with pytest.raises(ValueError, match="not a digest"):
        digest.parse(text)


def test_one_digest_has_one_size() -> None:
    assert "two sizes" in refused(document(artifacts=[artifact(path="a"), artifact(path="b", size=99)], entrypoint="a"))


# -- URLs

BAD_URLS = [
    "https://", "https:///x", "https:h/xxxx", "//h/xxxxxx", "file:///etc/passwd", "ftp://h/xxx", "gopher://h/x", "data:text/plain,x",
    "javascript:alert(1)",
    "https://u@h/x", "https://u:p@h/x", "https://@h/xx", "https://:@h/x", "https://h\\@e/x", "https://h/a b", "https://h/\n",
    "https://h/\tx", "\nhttps://h/",
    " https://h/", "https://h/x#y", "https://h/x#", "https://h#", "https://é/xx", "https://h/é", "https://h:99999/", "https://h:-1/",
    "https://h:+80/",
    "https://h:8_0/", "https://h:a/", "https://h:1:2/", "https://[::1/", "https://[::1]x/", "https://[zz]/", "https://[v1.a]/",
    "https://[fe80::1%25eth0]/",
    "https://.", "https://..", "https://a..b/", "https://h%00/", "https://h%2f..%2f", "https://%68/", "https://h%40e/", "https://*/xx",
    "https://h;x/", "https://h,e/",
    "https://h|e/", "https://h&e/", 'https://h"e/', "https://h<e/", "https://h`e/", "https://h$(x)/", "https://h{x}/", "https://h'/",
    "https://h^e/", "https://(h)/",
]  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS, ids=ascii)
def test_a_url_names_one_host_for_every_reader(url: str) -> None:
    refused(document(urls=[url]))


@pytest.mark.parametrize(
    "url",
    ["https://h/x", "http://h/x", "https://h:8443/", "https://[::1]:80/", "https://127.0.0.1/", "https://a-b.c_d.example./x?y={z}&w=%2e"],
)
def test_a_plain_url_is_one(url: str) -> None:
    assert snapshot.decode(compact(document(urls=[url]))).models[0].artifacts[0].urls == (url,)


@pytest.mark.parametrize(
    "template",
    ["https://h/xxx", "https://h/{HEX}", "https://h/{hex}{", "https://h/{hex}{}", "https://h/{hex.__class__}", "https://h/{hex}/{size}",
    "https://h/{{hex}}",
     "{algorithm}://h/{hex}", "https://{hex}@h/x", "https://h/#{hex}", "file:///{hex}", "https://h/{hex}\n", "https://h/%({hex})s{0}"],
)  # fmt: skip
def test_a_template_names_the_blob_and_nothing_else(template: str) -> None:
    assert "fallback" in refused(document() | {"sources": {"fallback": [template]}})


def test_a_template_reaches_no_attribute() -> None:
    assert urls.expand("{hex.__class__}{hex!r}{0}", "sha256", HEX) == "{hex.__class__}{hex!r}{0}"


# -- numbers

_PLACES: dict[str, Callable[[str], bytes]] = {
    "version": lambda value: _put(document() | {"version": "@"}, value),
    "schema": lambda value: _put(document() | {"schema": "@"}, value),
    "size": lambda value: _put(document(artifacts=[artifact(size="@")]), value),
    "gpu_memory": lambda value: _put(document(gpu_memory="@"), value),
    "max_tokens": lambda value: _put(document(smoke={"max_tokens": "@"}), value),
}


def _put(changed: Document, value: str) -> bytes:
    return compact(changed).replace(b'"@"', value.encode())


@pytest.mark.parametrize("place", _PLACES)
@pytest.mark.parametrize("value", ["1.5", "true", "false", '"1"', "null", "-1", "9007199254740992", "9" * 20, "9" * 5000, "1e400", "NaN",
    "Infinity", "-Infinity", "01",
                                   "+1", "0x1", "1_0", "١", "[1]", "{}", "", "1.", "- 1"])  # fmt: skip
def test_a_number_is_an_integer_that_every_reader_holds(place: str, value: str) -> None:
    refused(_PLACES[place](value))


@pytest.mark.parametrize("place", ["version", "size"])
def test_nothing_is_no_version_and_no_size(place: str) -> None:
    refused(_PLACES[place]("0"))
    refused(_PLACES[place]("-0"))


# -- JSON, also where nobody looks


def ignored(text: str | bytes) -> bytes:
    """Return a good document with *text* as another field, which the reader ignores."""
    return compact(document())[:-1] + b',"ignored":' + (text if isinstance(text, bytes) else text.encode()) + b"}"


def test_unknown_fields_are_ignored_at_every_level_and_what_stands_in_them_is_strict() -> None:
    for made in (
        document() | {"unknown": "@"},
        document(unknown="@"),
        document(artifacts=[artifact(unknown="@")]),
        document() | {"sources": {"unknown": "@"}},
        document(smoke={"expect": {"unknown": "@"}}),
    ):
        snapshot.decode(compact(made))
        for bad in ('{"a":1,"a":2}', "1e999", "NaN", '"\\ud800"', "9" * 30, "[" * 40 + "]" * 40):
            refused(_put(made, bad))


@pytest.mark.parametrize("twice", ['"name":"b",', f'"digest":"sha256:{HEX}",', '"unknown":1,"unknown":2,'])
def test_a_key_stands_once_in_a_model_too(twice: str) -> None:
    text = compact(document()).decode()
    place = '"path"' if "digest" in twice else '"version":"v1"'
    assert "duplicate key" in refused(text.replace(place, twice + place, 1).encode())


@pytest.mark.parametrize(
    "text",
    ['1,"ignored":2', '{"a":1,"a":1}', '{"a":1,"\\u0061":2}', '[[{"a":1,"b":2,"a":3}]]', '1,"version":9', '1,"models":[]', '{"":1,"":2}'],
)
def test_a_key_stands_once_wherever_it_stands(text: str) -> None:
    assert "duplicate key" in refused(ignored(text))


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "18446744073709551616",
        "-9223372036854775809",
        "9" * 5000,
        "01",
        "1.",
        ".5",
        "+1",
        "0x1",
    ],
)
def test_a_number_that_readers_hold_differently_is_refused_where_it_is_ignored(text: str) -> None:
    refused(ignored(text))


@pytest.mark.parametrize("text", [b'"\xff"', b'"\xc0\xaf"', b'"\xed\xa0\x80"', b'"\xf5\x80\x80\x80"', b'"\x01"', b'"\n"', b'"\\x41"',
    b'"\\u12"', b'"', b"'a'", b"nul", b"1/**/", b"1,",
                                  b"[1,]", b"{,}", b"{1:2}", b"\xef\xbb\xbf1"])  # fmt: skip
def test_text_that_is_no_json_is_refused_where_it_is_ignored(text: bytes) -> None:
    refused(ignored(text))


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\udfff"', '"\\udc00\\ud800"', '{"\\ud800":1}', '[["a\\ud83d"]]', '{"a":{"b":"\\uDEAD"}}'])
def test_half_a_character_is_refused_where_it_is_ignored(text: str) -> None:
    refused(ignored(text))


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', '"😀"', '"\\u0000"', '"\\/"'])
def test_a_whole_character_is_text_however_it_is_written(text: str) -> None:
    snapshot.decode(ignored(text))


@pytest.mark.parametrize("wrap", ["[]", '{"a":}'], ids=["lists", "objects"])
def test_depth_has_an_end_where_nobody_looks(wrap: str) -> None:
    opened, closed = wrap[:-1], wrap[-1]
    snapshot.decode(ignored(opened * 30 + "1" + closed * 30))
    for depth in (strict_json.MAX_DEPTH, strict_json.MAX_DEPTH * 2, 1000, 100_000):
        refused(ignored(opened * depth + "1" + closed * depth))


_DATA = compact(document())
_SHAPES = {
    "mark": b"\xef\xbb\xbf" + _DATA,
    "letter": _DATA + b"x",
    "twice": _DATA + _DATA,
    "nul-after": _DATA + b"\0",
    "nul-before": b"\0" + _DATA,
    "utf-16": _DATA.decode().encode("utf-16"),
    "utf-32": _DATA.decode().encode("utf-32"),
    "form-feed": _DATA + b"\x0c",
    "no-break-space": b"\xc2\xa0" + _DATA,
    "list": b"[" + _DATA + b"]",
    "open": _DATA[:-1],
    "nothing": b"",
    "null": b"null",
    "empty-list": b"[]",
    "text": json.dumps(_DATA.decode()).encode(),
    "comment": b"//\n" + _DATA,
}


@pytest.mark.parametrize("data", _SHAPES.values(), ids=list(_SHAPES))
def test_the_document_is_one_object_and_nothing_else(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize("key", ["Version", "VERSION", "version ", " version", "versi\u200bon", "ｖersion"])
def test_a_key_that_looks_like_one_is_not_it(key: str) -> None:
    found = document()
    found[key] = found.pop("version")
    refused(found)


# -- words that compilers say about a document


BAD_REGEXES = [
    "(", "[\x1b-\x01]", "(?\x1b)", "(?P<\x1b>a)", "(?P=\n)", "(?P<a\u202e>x)", "x{99999999999999999999}", "(" * 5000, "\\", "*",
]  # fmt: skip


@pytest.mark.parametrize("regex", BAD_REGEXES, ids=lambda one: ascii(one)[:20])
def test_what_is_no_regex_is_refused_in_words_fit_for_a_terminal(regex: str) -> None:
    assert "regex" in refused(document(smoke={"expect": {"regex": regex}}))


@pytest.mark.parametrize("text", ["\x1b", "==\x1b", "latest", ">=", "==1.0\u202e", ">=1,,<2;", "=1", "\0"], ids=ascii)
def test_what_is_no_specifier_is_refused_in_words_fit_for_a_terminal(text: str) -> None:
    assert "runtime.version" in refused(document(runtime={"engine": "llama-cpp", "version": text}))


@pytest.mark.parametrize("text", ["", "now", "1 day", "-1s", "1e9", "١s", "∞", "9" * 16, "1.s", "0x1s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    assert "timeout" in refused(document(smoke={"timeout": text}))
    assert "retest_after" in refused(document() | {"retest_after": text})


@pytest.mark.parametrize("text", ["", "2026-11-20", "2026-11-20T00:00:00", "2026-13-01T00:00:00Z", "2026-11-20T25:00:00Z",
    "2026-11-20T00:00:00+99:00", "0001-01-01T00:00:00Z",
                                  "9999-12-31T23:59:59Z", "1969-12-31T23:59:59Z", "tomorrow", "1763596800",
                                  "２026-11-20T00:00:00Z"])  # fmt: skip
def test_what_is_no_instant_is_refused(text: str) -> None:
    assert "issued_at" in refused(document() | {"issued_at": text})
    assert "expires_at" in refused(document() | {"expires_at": text})


def test_an_instant_is_no_number() -> None:
    refused(document() | {"issued_at": 1763596800})
    refused(document() | {"expires_at": 1e12})
