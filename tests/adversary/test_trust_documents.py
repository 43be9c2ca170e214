"""Attacks on the bytes of what is signed: size, form, encoding, keys, names; docs/attacks.md says which attack is refused where."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable
from typing import Any

import click
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec import structs

from reconciler.core import dsse, lock, snapshot, trust
from reconciler.core.errors import (
    BadEnvelope,
    BadRootChain,
    BadSignature,
    Equivocation,
    Expired,
    NotYetValid,
    ReconcileError,
    Rollback,
    RootExpired,
    TooLarge,
    WrongNetwork,
)
from reconciler.core.node import Limits
from tests.hostile_network import FLOOR, HostileNetwork, Node, refused, two_of_three, verify
from tests.network import Document, Network, b64, compact, envelope, keys, payload_of, signatures_of

# -- endless data ----------------------------------------------------------------------------------


def test_endless_data_is_refused_for_its_size_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*_: object) -> None:
        raise AssertionError("parsed before its size was checked")

    monkeypatch.setattr("reconciler.core.strict_json.decode", parsed)
    network = Network()
    with pytest.raises(TooLarge):
        dsse.decode(b" " * (Limits().envelope_bytes + 1))
    with pytest.raises(TooLarge):
        trust.pin(network.root() + b" " * Limits().root_bytes)


def test_endless_signatures_cost_sixty_four_looks_and_no_more() -> None:
    network = Network()
    late = [*keys("stranger", 1) * 64, *network.snapshot_keys]
    with pytest.raises(BadSignature, match="role: 0, needed"):
        verify(network, network.snapshot(signers=late))
    assert verify(network, network.snapshot(signers=late[1:])).snapshot.version == 2


def test_endless_search_for_a_duplicate_key_is_linear() -> None:
    """One object of half a million keys with a duplicate at its end took hours: its name was looked for pair by pair."""
    fields = ",".join(f'"k{index}":1' for index in range(30_000))
    data = f'{{{fields},"z":1,"z":1}}'.encode()
    root = envelope(trust.ROOT_TYPE, b'{"schema":1,' + data[1:], keys("anybody", 1))
    begun = time.process_time()
    with pytest.raises(BadEnvelope):
        trust.root_version(root)
    with pytest.raises(BadEnvelope, match="duplicate key 'z'"):
        snapshot.decode(compact(Network().snapshot_document())[:-1] + b"," + data[1:])
    assert time.process_time() - begun < 5  # quadratic: 8 s here at a sixteenth of the size that is let in


def test_endless_depth_is_refused() -> None:
    network = Network()
    for payload in (b"[" * 100_000, compact(network.snapshot_document() | {"x": nested(40)})):
        with pytest.raises(BadEnvelope):
            verify(network, network.sign_snapshot(payload))
    with pytest.raises(BadEnvelope):
        verify(network, b"[" * 100_000)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_extraneous_sources_a_lock_names_only_what_was_signed() -> None:
    network = Network()
    template = "https://mirror.example.org/{algorithm}/{hex}"
    found = lock.compile(network.verified(network.model("a:v1", b"x"), sources={"fallback": [template]}))
    ((digest, blob),) = found.blob.items()
    digits = digest.removeprefix("sha256:")
    assert blob.sources == (f"https://models.example.org/{digits}", f"https://mirror.example.org/sha256/{digits}")


# -- confusion -------------------------------------------------------------------------------------


def test_signature_confusion_a_root_is_no_snapshot_and_a_snapshot_no_root() -> None:
    network = Network()
    with pytest.raises(BadEnvelope, match="payload type"):
        verify(network, network.root())
    with pytest.raises(BadEnvelope, match="payload type"):
        trust.pin(network.snapshot())


def test_signature_confusion_a_disguised_payload_type_is_refused() -> None:
    network = HostileNetwork()
    network.disguise(network.root(signers=[*network.root_keys, *network.snapshot_keys]), trust.SNAPSHOT_TYPE)
    with pytest.raises(BadSignature):
        verify(network, network.served)
    for kind in (trust.SNAPSHOT_TYPE.upper(), trust.SNAPSHOT_TYPE + " ", trust.SNAPSHOT_TYPE.replace("v1", "v2"), ""):
        network.disguise(network.snapshot(), kind)
        with pytest.raises(BadEnvelope, match="payload type"):
            verify(network, network.served)


def test_signature_confusion_the_payload_alone_or_its_base64_is_not_what_is_signed() -> None:
    network = Network()
    payload = compact(network.snapshot_document())
    key = network.snapshot_keys[0]
    for message in (payload, base64.b64encode(payload), trust.SNAPSHOT_TYPE.encode() + payload):
        signature = {"keyid": key.id, "sig": b64(key.private.sign(message))}
        with pytest.raises(BadSignature):
            verify(network, compact({"payloadType": trust.SNAPSHOT_TYPE, "payload": b64(payload), "signatures": [signature]}))


# -- parse differentials ---------------------------------------------------------------------------

TEXT = Callable[[str], str]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("duplicate key", lambda text: text.replace('"version":1', '"version":2,"version":1', 1)),
        ("duplicate key in an ignored field", lambda text: text[:-1] + ',"jobs":{"a":1,"a":2}}'),
        ("duplicate key, escaped", lambda text: text.replace('"version":1', '"ver\\u0073ion":2,"version":1', 1)),
        ("NaN", lambda text: text[:-1] + ',"jobs":NaN}'),
        ("Infinity", lambda text: text[:-1] + ',"jobs":-Infinity}'),
        ("infinite number", lambda text: text[:-1] + ',"jobs":1e999}'),
        ("float for an integer", lambda text: text.replace('"version":1', '"version":1.5', 1)),
        ("boolean for an integer", lambda text: text.replace('"version":1', '"version":true', 1)),
        ("text for an integer", lambda text: text.replace('"version":1', '"version":"1"', 1)),
        ("integer of 65 bits", lambda text: text.replace('"version":1', '"version":18446744073709551617', 1)),
        ("integer of 65 bits in an ignored field", lambda text: text[:-1] + ',"jobs":18446744073709551616}'),
        ("negative version", lambda text: text.replace('"version":1', '"version":-1', 1)),
        ("trailing data", lambda text: text + "{}"),
        ("trailing NUL", lambda text: text + "\0"),
        ("byte order mark", lambda text: "\ufeff" + text),
        ("lone surrogate in an ignored field", lambda text: text[:-1] + ',"jobs":"\\ud800"}'),
        ("raw control character", lambda text: text[:-1] + ',"jobs":"\x01"}'),
        ("comment", lambda text: text[:-1] + "/* */}"),
        ("trailing comma", lambda text: text[:-1] + ",}"),
        ("single quotes", lambda text: text.replace('"', "'")),
        ("null for a list", lambda text: text.replace('"models":[]', '"models":null')),
        ("unknown schema", lambda text: text.replace('"schema":1', '"schema":2')),
        ("missing schema", lambda text: text.replace('"schema":1,', "")),
        ("a time without a zone", lambda text: text.replace('00Z"', '00"')),
        ("a time at the rim of the calendar", lambda text: text.replace('"issued_at":"2026-', '"issued_at":"0001-')),
        ("an array for the document", lambda text: f"[{text}]"),
        ("nothing", lambda _text: ""),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_parse_differential_is_refused_though_signed(name: str, change: TEXT) -> None:
    network = Network()
    text = compact(network.snapshot_document()).decode()
    changed = change(text)
    assert changed != text, name
    with pytest.raises(BadEnvelope):
        verify(network, network.sign_snapshot(changed.encode("utf-8", "surrogatepass")))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"signatures"', '"payload":"e30=","signatures"'),
        lambda text: text.replace('{"payloadType"', '{"more":1,"payloadType"'),
        lambda text: text.replace('"keyid"', '"cert":"x","keyid"', 1),
        lambda text: text.replace('"keyid"', '"sig":"AAAA","keyid"', 1),
        lambda text: text.replace('"signatures":[', '"signatures":{').replace("]}", "}}"),
        lambda text: text + text,
        lambda text: "\ufeff" + text,
    ],
)
def test_parse_differential_in_the_envelope_is_refused(change: TEXT) -> None:
    network = Network()
    text = network.snapshot().decode()
    assert change(text) != text
    with pytest.raises(BadEnvelope):
        verify(network, change(text).encode())


def test_parse_differential_not_utf8_is_refused() -> None:
    network = Network()
    payload = compact(network.snapshot_document())[:-1] + b',"jobs":"\xff\xfe"}'
    with pytest.raises(BadEnvelope):
        verify(network, network.sign_snapshot(payload))


def test_parse_differential_the_parsed_bytes_are_the_signed_bytes() -> None:
    network = Network()
    document = network.snapshot_document() | {"jobs": {"rate": 1}}
    payload = json.dumps(document, indent=3).encode()
    verified = verify(network, network.sign_snapshot(payload))
    assert verified.digest == f"sha256:{trust.fingerprint_of(payload)}"


# -- base64 ----------------------------------------------------------------------------------------


def with_payload(data: bytes, change: TEXT) -> bytes:
    outer = json.loads(data)
    return compact(outer | {"payload": change(outer["payload"])})


def padded_payload(network: Network) -> bytes:
    """Return an envelope whose payload's base64 ends in ``=`` and holds a ``+`` and a ``/``."""
    document = network.snapshot_document() | {"jobs": "~~~>>>???\u00ff\u00fe"}
    while not (text := b64(compact(document))).endswith("=") or text.endswith("==") or "+" not in text or "/" not in text:
        document["jobs"] += ">"
    return network.sign_snapshot(document)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text[:40] + "\n" + text[40:],
        lambda text: text[:40] + "!!" + text[40:],
        lambda text: text.rstrip("="),
        lambda text: text + "=",
        lambda text: text + "====",
        lambda text: text[:-2] + chr(ord(text[-2]) + 1) + "=",
        lambda text: text.replace("+", "-", 1),
        lambda text: text.replace("/", "_", 1),
        lambda text: text[:40] + "=" + text[40:],
        lambda text: text[:40] + "\u0661" + text[40:],
        lambda text: text + "\0",
    ],
)
def test_base64_laxity_is_refused(change: TEXT) -> None:
    network = Network()
    data = padded_payload(network)
    assert with_payload(data, change) != data
    with pytest.raises((BadEnvelope, BadSignature)) as found:
        verify(network, with_payload(data, change))
    assert found.type is BadEnvelope


def test_base64_both_alphabets_are_read_as_dsse_asks() -> None:
    network = Network()
    data = padded_payload(network)
    other = with_payload(data, lambda text: text.replace("+", "-").replace("/", "_"))
    assert verify(network, other) == verify(network, data)


# -- weak keys and malleable signatures ------------------------------------------------------------

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493


def small_order_encodings() -> list[bytes]:
    """Return every encoding of every point of order 1, 2, 4 and 8, canonical or not, reckoned here from the curve itself."""
    d = -121665 * pow(121666, -1, P) % P
    ys = {0, 1, P - 1, *(y for y in eighth_roots(d))}
    return [(value | sign << 255).to_bytes(32, "little") for y in sorted(ys) for value in (y, y + P) if value < 2**255 for sign in (0, 1)]


def eighth_roots(d: int) -> list[int]:
    """Return the y of the points of order 8: doubling one gives y = 0, so that x² = -y², and the curve gives d·y⁴ + 2·y² - 1 = 0."""
    root = square_root((1 + d) % P)
    found = []
    for sign in (1, -1):
        square = (-1 + sign * root) * pow(d, -1, P) % P
        if pow(square, (P - 1) // 2, P) == 1:
            y = square_root(square)
            found += [y, P - y]
    return found


def square_root(value: int) -> int:
    root = pow(value, (P + 3) // 8, P)
    if root * root % P != value % P:
        root = root * pow(2, (P - 1) // 4, P) % P
    assert root * root % P == value % P
    return root


def test_weak_keys_there_are_fourteen_encodings_of_eight_small_points() -> None:
    assert len(small_order_encodings()) == 14


@pytest.mark.parametrize("raw", small_order_encodings(), ids=lambda raw: raw.hex()[:8] + raw.hex()[-4:])
def test_weak_keys_are_refused_with_their_root(raw: bytes) -> None:
    public = Ed25519PublicKey.from_public_bytes(raw)
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(BadRootChain, match="small order"):
        dsse.load_public_key(dsse.keyid_of(public), pem)


def test_weak_keys_in_no_role_are_refused_with_their_root_too() -> None:
    """Whoever makes a root is told so at once, and not when the next rotation gives the key a role."""
    public = Ed25519PublicKey.from_public_bytes(small_order_encodings()[0])
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    root = Network().trusted()
    with pytest.raises(BadRootChain, match="small order"):
        trust.check_root(structs.replace(root, keys={**root.keys, dsse.keyid_of(public): trust.Key(scheme="ed25519", public=pem)}))


def test_weak_keys_a_non_canonical_encoding_of_a_strong_looking_point_is_refused() -> None:
    for extra in range(2, 19):
        public = Ed25519PublicKey.from_public_bytes((P + extra).to_bytes(32, "little"))
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        with pytest.raises(BadRootChain, match="canonical"):
            dsse.load_public_key(dsse.keyid_of(public), pem)


def test_weak_keys_anybody_could_sign_with_one_if_it_were_let_in() -> None:
    """Why they are refused: this signature was made without any private key, and the library takes it."""
    raw = (1).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(raw).verify(raw + bytes(32), b"whatever")


@pytest.mark.parametrize("pem", ["", "x", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "\x00" * 100, "é" * 10])
def test_weak_keys_what_is_no_key_is_refused(pem: str) -> None:
    with pytest.raises(BadRootChain):
        dsse.load_public_key("0" * 64, pem)


def test_weak_keys_of_another_algorithm_are_refused() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519

    made: list[Any] = [
        rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1()), ed448.Ed448PrivateKey.generate(),
        x25519.X25519PrivateKey.generate(),
    ]  # fmt: skip
    for key in made:
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        with pytest.raises(BadRootChain, match="not an Ed25519 key"):
            dsse.load_public_key(dsse.keyid_of(key.public_key()), pem)


def test_signature_malleability_s_plus_the_order_is_refused() -> None:
    network = Network()
    outer = json.loads(network.snapshot())
    raw = base64.b64decode(outer["signatures"][0]["sig"])
    s = int.from_bytes(raw[32:], "little") + L
    outer["signatures"][0]["sig"] = b64(raw[:32] + s.to_bytes(32, "little"))
    with pytest.raises(BadSignature):
        verify(network, compact(outer))


@pytest.mark.parametrize("raw", [b"", b"\0" * 63, b"\0" * 64, b"\0" * 65, b"\xff" * 64])
def test_signature_of_another_length_or_none_at_all_is_refused(raw: bytes) -> None:
    network = Network()
    outer = json.loads(network.snapshot())
    outer["signatures"][0]["sig"] = b64(raw)
    with pytest.raises(BadSignature):
        verify(network, compact(outer))


# -- names and paths -------------------------------------------------------------------------------


def with_model(change: Document) -> bytes:
    network = Network()
    return network.snapshot(network.model("a:v1") | change)


@pytest.mark.parametrize("name", ["", "..", ".a", "-a", "a/b", "a\\b", "A", "a b", "a\n", "a\0", "é", "a" * 129, "a:b", "а", "%2e%2e"])
def test_name_injection_is_refused(name: str) -> None:
    with pytest.raises(BadEnvelope):
        verify(Network(), with_model({"name": name}))


@pytest.mark.parametrize("version", ["", "..", ".1", "-1", "v/1", "v 1", "v1\n", "v\0", "é", "v" * 65, "v:1"])
def test_version_injection_is_refused(version: str) -> None:
    with pytest.raises(BadEnvelope):
        verify(Network(), with_model({"version": version}))


@pytest.mark.parametrize(
    "path",
    [
        "", "/etc/passwd", "../x", "a/../x", "a/./x", "a//x", "a/", ".", "..", "a\\x", "C:\\x", "a\nx", "a\0x", "a\x7fx", "a\u202ex",
        "a\u2028x", "e\u0301", "x" * 256, "/".join("x" * 200 for _ in range(6)),
    ],
)  # fmt: skip
def test_path_injection_is_refused(path: str) -> None:
    artifact = Network().model("a:v1")["artifacts"][0]
    with pytest.raises(BadEnvelope):
        verify(Network(), with_model({"artifacts": [artifact | {"path": path}], "entrypoint": path}))


@pytest.mark.parametrize(
    "digest",
    ["", "sha256:", "sha256:" + "0" * 63, "sha256:" + "0" * 65, "sha256:" + "A" * 64, "md5:" + "0" * 31, "sha256:" + "0" * 64 + "\n",
     "sha256:../" + "0" * 61, "SHA256:" + "0" * 64, "0" * 64, "sha256:" + "\u0661" * 64],
)  # fmt: skip
def test_digest_injection_is_refused(digest: str) -> None:
    artifact = Network().model("a:v1")["artifacts"][0]
    with pytest.raises(BadEnvelope):
        verify(Network(), with_model({"artifacts": [artifact | {"digest": digest}]}))


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://h/x", "https://", "https:///x", "https://user:pw@h/x", "https://h/x#y", "https://h/\nx", "https://h/ x",
     "https://h\\@evil/x", "javascript:alert(1)", "https://h:99999/x", "https://[::1/x", "magnet:?xt=urn:btih:0", "//h/x-------"],
)  # fmt: skip
def test_url_injection_is_refused(url: str) -> None:
    artifact = Network().model("a:v1")["artifacts"][0]
    with pytest.raises(BadEnvelope):
        verify(Network(), with_model({"artifacts": [artifact | {"urls": [url]}]}))


def test_name_collision_two_models_or_files_that_some_disk_takes_for_one_are_refused() -> None:
    network = Network()
    with pytest.raises(BadEnvelope, match="duplicate id"):
        verify(network, network.snapshot(network.model("a:v1"), network.model("a:V1")))
    one, other = network.model("a:v1", path="File")["artifacts"][0], network.model("b:v1", path="file")["artifacts"][0]
    with pytest.raises(BadEnvelope, match="twice"):
        verify(network, network.snapshot(network.model("a:v1") | {"artifacts": [one, other], "entrypoint": "file"}))
    inner = network.model("b:v1", path="file/inner")["artifacts"][0]
    with pytest.raises(BadEnvelope, match="both a file and a folder"):
        verify(network, network.snapshot(network.model("a:v1") | {"artifacts": [other, inner], "entrypoint": "file"}))


# -- removal, downgrade, logs ----------------------------------------------------------------------


def test_removal_an_empty_list_needs_the_threshold_like_any_other() -> None:
    network = two_of_three()
    node = Node(network)
    network.publish(network.model("a:v1"), network.model("b:v1"))
    node.sync()
    network.served = network.snapshot(signers=network.snapshot_keys[:1])
    refused(node, BadSignature)


def test_downgrade_no_option_of_any_command_turns_verification_off() -> None:
    from reconciler.cli import cli

    words = ("insecure", "no-verify", "skip", "unsigned", "trust-all", "no-check", "ignore", "disable", "unsafe")
    for path, command in commands(cli, "reconcile"):
        for parameter in command.params:
            for name in (*parameter.opts, *parameter.secondary_opts):
                assert not any(word in name for word in words), f"{path} {name}"


def commands(command: click.Command, path: str) -> list[tuple[str, click.Command]]:
    below = _below(command) if isinstance(command, click.Group) else ()
    return [(path, command), *(found for name, child in below for found in commands(child, f"{path} {name}"))]


def _below(group: click.Group) -> list[tuple[str, click.Command]]:
    context = click.Context(group)
    return [(name, child) for name in group.list_commands(context) if (child := group.get_command(context, name))]


def test_downgrade_no_environment_variable_is_read_where_trust_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(dict[str, str]):
        def __getitem__(self, name: str) -> str:
            raise AssertionError(f"{name} was read")

        def get(self, name: str, default: Any = None) -> Any:
            raise AssertionError(f"{name} was read")

        def __contains__(self, name: object) -> bool:
            raise AssertionError(f"{name} was looked for")

    network = Network()
    good, bad, root = network.snapshot(), network.snapshot(signers=[]), network.trusted()
    monkeypatch.setattr(os, "environ", Watched())
    trust.verify(good, root, now=network.now, trust_state=FLOOR)
    with pytest.raises(BadSignature):
        trust.verify(bad, root, now=network.now, trust_state=FLOOR)


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\r\n", "\u202e", "\x9b31m", "\x07"])
def test_log_injection_through_a_refusal_is_escaped(hostile: str) -> None:
    network = Network()
    said = []
    twice = f",{json.dumps(hostile)}:1,{json.dumps(hostile)}:2}}".encode()
    outer = json.loads(network.snapshot())
    for data in (
        compact(outer | {hostile: 1}),
        compact(outer | {"payloadType": hostile}),
        with_model({"state": hostile}),
        with_model({"entrypoint": f"a{hostile}"}),
        network.sign_snapshot(compact(network.snapshot_document())[:-1] + twice),
    ):
        with pytest.raises(ReconcileError) as found:
            verify(network, data)
        said.append(found.value.message + found.value.hint)
    assert all(text.isprintable() for text in said), said


def test_every_refusal_of_trust_ends_with_exit_code_four() -> None:
    trust_errors = (BadEnvelope, BadSignature, BadRootChain, WrongNetwork, Rollback, Equivocation, Expired, NotYetValid, RootExpired)
    for kind in (*trust_errors, TooLarge):
        assert kind.exit_code == 4
        assert kind("x").name != "trust"


def test_the_hostile_network_serves_what_its_script_says() -> None:
    """The simulator is no proof if it serves honest bytes by mistake."""
    network = two_of_three()
    first = network.publish(network.model("a:v1"))
    second = network.publish(network.model("a:v2"))
    assert network.served == second
    network.replay(1)
    assert network.served == first
    network.mix(payload=2, signatures=1)
    assert payload_of(network.served) == payload_of(second)
    assert signatures_of(network.served) == signatures_of(first)
