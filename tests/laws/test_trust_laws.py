"""Laws of trust: whatever comes in, a value or a named refusal comes out; one bit decides; others' envelopes verify and ours do theirs."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.core import dsse, lock, trust
from reconciler.core.errors import BadSignature, ReconcileError
from tests.network import Key, Network, b64, compact, envelope

FLOOR = trust.TrustState()
MUTATIONS = int(os.environ.get("RECONCILE_FUZZ", "20000"))


def small() -> tuple[Network, bytes, trust.TrustRoot]:
    network = Network(snapshot_keys=2, snapshot_threshold=2)
    return network, network.snapshot(network.model("a:v1")), network.trusted()


# -- one bit ---------------------------------------------------------------------------------------


def test_one_flipped_bit_anywhere_in_a_snapshot_is_refused() -> None:
    network, data, root = small()
    trust.verify(data, root, now=network.now, trust_state=FLOOR)
    for place in range(len(data) * 8):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(ReconcileError):
            trust.verify(bytes(changed), root, now=network.now, trust_state=FLOOR)


def test_one_flipped_bit_anywhere_in_a_root_is_refused() -> None:
    network = Network()
    root, following = network.trusted(), network.rotate()
    trust.advance(root, following)
    for place in range(len(following) * 8):
        changed = bytearray(following)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(ReconcileError):
            trust.advance(root, bytes(changed))


def test_one_byte_less_or_more_is_refused() -> None:
    network, data, root = small()
    for place in range(len(data)):
        for changed in (data[:place] + data[place + 1 :], data[:place]):
            with pytest.raises(ReconcileError):
                trust.verify(changed, root, now=network.now, trust_state=FLOOR)


# -- mutations -------------------------------------------------------------------------------------

#: Pieces that parsers have stumbled over.
_PIECES = (
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"1e999", b"-0", b"NaN", b"\\u0000", b"\\ud800", b"\x00", b"\xff",
    b"\xef\xbb\xbf", b"=", b"==", b"-", b"_", b"+", b"/", b" ", b"\n", b"9" * 30, b'"payload":""', b'"signatures":[]', b"[" * 40,
    b"\xe2\x80\xae",
)  # fmt: skip


def mutated(seed: bytes, other: bytes, random_: random.Random) -> bytes:
    """Return *seed* with one to three places changed: flipped, cut, repeated, spliced with *other*, or a piece put in."""
    data = bytearray(seed)
    for _ in range(random_.randint(1, 3)):
        place, length = random_.randrange(len(data) + 1), random_.choice((1, 1, 2, 8, 64))
        match random_.randrange(7):
            case 0:
                data[place : place + 1] = bytes([random_.randrange(256)])
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = data[place : place + length]
            case 3:
                start = random_.randrange(len(other))
                data[place : place + length] = other[start : start + length]
            case 4:
                data[place:place] = random_.choice(_PIECES)
            case 5:
                data[place : place + length] = random_.choice(_PIECES)
            case _:
                data = data[:place] + bytearray(other[place:])
    return bytes(data)


def resigned(network: Network, payload: bytes) -> bytes:
    """Return a mutated payload, signed by an operator who does not look: what is behind the signature check is fuzzed too."""
    return envelope(trust.SNAPSHOT_TYPE, payload, network.snapshot_keys)


def test_mutated_envelopes_are_refused_by_name_or_say_what_was_signed() -> None:
    network, first, root = small()
    second = network.snapshot(network.model("b:v2"), network.model("c:v1"))
    payload = base64.b64decode(json.loads(second)["payload"])
    said = {base64.b64decode(json.loads(data)["payload"]) for data in (first, second)}
    random_ = random.Random(20261120)
    for count in range(MUTATIONS):
        raw = count % 4 > 0
        data = mutated(first, second, random_) if raw else resigned(network, mutated(payload, first, random_))
        try:
            found = trust.verify(data, root, now=network.now, trust_state=FLOOR)
        except ReconcileError:
            continue
        compiled = lock.compile(found)
        assert lock.decode(lock.encode(compiled)) == compiled, data
        if raw:
            assert found.digest in {f"sha256:{trust.fingerprint_of(one)}" for one in said}, data


def test_mutated_roots_are_refused_by_name_or_follow() -> None:
    network = Network()
    root, first = network.trusted(), network.rotate()
    other = network.rotate()
    payload = base64.b64decode(json.loads(first)["payload"])
    random_ = random.Random(20261121)
    for count in range(MUTATIONS // 10):
        raw = count % 2
        data = mutated(first, other, random_) if raw else network.sign_root(mutated(payload, other, random_))
        for read in (lambda data: trust.advance(root, data), trust.pin, trust.root_version):
            try:
                read(data)
            except ReconcileError:
                continue


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_whatever_bytes_come_in_a_value_or_a_named_refusal_comes_out(data: bytes) -> None:
    network, _, root = small()
    readers: list[Callable[[bytes], Any]] = [
        lambda data: trust.verify(data, root, now=network.now, trust_state=FLOOR), trust.pin, trust.root_version, dsse.decode,
    ]  # fmt: skip
    for read in readers:
        with pytest.raises(ReconcileError):
            read(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["schema", "network", "version", "issued_at", "expires_at", "models", "sources", "retest_after", "keys", "roles", "more"]
)


@settings(max_examples=400, deadline=None)
@given(FIELDS, JSON)
def test_whatever_value_a_signed_field_has_a_value_or_a_named_refusal_comes_out(field: str, value: Any) -> None:
    network = Network()
    root = network.trusted()
    documents: Iterator[Callable[[], object]] = iter(
        (
            lambda: trust.verify(
                network.sign_snapshot(network.snapshot_document() | {field: value}), root, now=network.now, trust_state=FLOOR
            ),
            lambda: trust.pin(network.root(**{field: value})),
        )
    )
    for read in documents:
        try:
            read()
        except ReconcileError as error:
            assert error.exit_code == 4  # noqa: PT017  a refusal is one of the two lawful answers


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=30))
def test_accepted_versions_never_go_down(versions: list[int]) -> None:
    network = Network()
    root, trust_state, accepted = network.trusted(), FLOOR, [0]
    for version in versions:
        try:
            found = trust.verify(network.snapshot(version=version), root, now=network.now, trust_state=trust_state)
        except ReconcileError:
            continue
        trust_state = trust.advance_state(trust_state, found)
        accepted.append(found.snapshot.version)
    assert accepted == sorted(accepted)
    assert accepted[-1] == max(versions)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(0, 5), max_size=8))
def test_a_snapshot_is_accepted_if_and_only_if_enough_distinct_keys_signed(count: int, threshold: int, signers: list[int]) -> None:
    threshold = min(threshold, count)
    network = Network(snapshot_keys=count, snapshot_threshold=threshold)
    everybody = [*network.snapshot_keys, *(Key(f"stranger/{index}") for index in range(6 - count))]
    data = network.snapshot(signers=[everybody[index] for index in signers])
    enough = len({index for index in signers if index < count}) >= threshold
    try:
        trust.verify(data, network.trusted(), now=network.now, trust_state=FLOOR)
    except BadSignature:
        assert not enough
    else:
        assert enough


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.binary(max_size=300), st.text(max_size=300), st.binary(max_size=300))
def test_what_is_signed_tells_type_and_payload_apart(kind: str, payload: bytes, other_kind: str, other_payload: bytes) -> None:
    same = (kind, payload) == (other_kind, other_payload)
    assert (dsse.pae(kind, payload) == dsse.pae(other_kind, other_payload)) is same


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_base64_has_one_spelling_in_each_alphabet(data: bytes) -> None:
    assert dsse.decode_base64(base64.b64encode(data).decode()) == data
    assert dsse.decode_base64(base64.urlsafe_b64encode(data).decode()) == data


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="ABab01+/-_=", max_size=12))
def test_base64_that_is_taken_is_what_an_encoder_writes(text: str) -> None:
    try:
        data = dsse.decode_base64(text)
    except ReconcileError:
        return
    assert text in {base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()}


# -- others' tools ---------------------------------------------------------------------------------


def test_interop_the_dsse_specifications_own_vector() -> None:
    """DSSE v1, protocol.md, Test Vectors: ECDSA over P-256, which no root here may list; the signed bytes are what is compared."""
    from cryptography.hazmat.primitives.asymmetric import ec, utils
    from cryptography.hazmat.primitives.hashes import SHA256

    signed = dsse.pae("http://example.com/HelloWorld", b"hello world")
    assert signed == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    signature = base64.b64decode("A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA==")
    numbers = ec.EllipticCurvePublicNumbers(
        46950820868899156662930047687818585632848591499744589407958293238635476079160,
        5640078356564379163099075877009565129882514886557779369047442380624545832820,
        ec.SECP256R1(),
    )
    der = utils.encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
    numbers.public_key().verify(der, signed, ec.ECDSA(SHA256()))


def test_interop_our_envelopes_verify_with_securesystemslib() -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    network, data, _ = small()
    theirs = Envelope.from_dict(json.loads(data))
    keys = [SSlibKey.from_crypto(key.public, key.id) for key in network.snapshot_keys]
    assert len(theirs.verify(keys, 2)) == 2
    assert theirs.pae() == dsse.decode(data).pae()


def test_interop_their_envelopes_verify_here() -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    network, _, root = small()
    payload = compact(network.snapshot_document(network.model("b:v1")))
    theirs = Envelope(payload=payload, payload_type=trust.SNAPSHOT_TYPE, signatures={})
    for key in network.snapshot_keys:
        signer = CryptoSigner(key.private)
        signer.public_key.keyid = key.id
        theirs.sign(signer)
    found = trust.verify(json.dumps(theirs.to_dict()).encode(), root, now=network.now, trust_state=FLOOR)
    assert found.snapshot.models[0].id == "b:v1"


def test_interop_signatures_made_by_openssl_verify_here_and_the_other_way_round(tmp_path: Path) -> None:
    network = Network()
    key, payload = network.snapshot_keys[0], compact(network.snapshot_document())
    (tmp_path / "key").write_bytes(key.private_pem())
    (tmp_path / "pub").write_text(key.pem)
    (tmp_path / "pae").write_bytes(dsse.pae(trust.SNAPSHOT_TYPE, payload))
    openssl(tmp_path, "pkeyutl", "-sign", "-rawin", "-inkey", "key", "-in", "pae", "-out", "sig")
    signature = {"keyid": key.id, "sig": b64((tmp_path / "sig").read_bytes())}
    data = compact({"payloadType": trust.SNAPSHOT_TYPE, "payload": b64(payload), "signatures": [signature]})
    assert trust.verify(data, network.trusted(), now=network.now, trust_state=FLOOR).snapshot.version == 1
    (tmp_path / "ours").write_bytes(base64.b64decode(key.sign(trust.SNAPSHOT_TYPE, payload)["sig"]))
    openssl(tmp_path, "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", "pub", "-in", "pae", "-sigfile", "ours")
    der = openssl(tmp_path, "pkey", "-pubin", "-in", "pub", "-outform", "DER")
    assert trust.fingerprint_of(der) == key.id, "a key id is what sha256sum says of openssl's DER"


def openssl(folder: Path, *arguments: str) -> bytes:
    return subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=30).stdout


def test_a_root_that_expires_in_between_is_walked_through_and_the_last_decides() -> None:
    network = Network()
    root = network.trusted()
    chain = [network.rotate(expires_at="2026-01-01T00:00:00Z") for _ in range(5)] + [network.rotate()]
    assert trust.apply_root_chain(root, chain).version == 7
    assert trust.apply_root_chain(root, chain).expires_at == network.now + timedelta(days=365)
