"""What a lock says, byte for byte."""

from __future__ import annotations

import pytest

from reconciler.core import digest, lock
from reconciler.core.errors import LockMismatch
from tests.network import Network

EXPECTED = """\
# models.lock: what the network's signed snapshot compiles to. Made by `reconcile lock`; commit it with snapshot.json.
# Do not edit: every command compiles the snapshot again and refuses a lock that differs.

schema = 1
network = "testnet"
retest_after = "7d"
allow_node_fallback = true

[snapshot]
version = 1
"""


def made(**changes: object) -> lock.Lock:
    network = Network()
    return lock.compile(network.verified(network.model("b:v1", b"shared"), network.model("a:v1", b"shared"), **changes))


def test_a_lock_reads_like_this() -> None:
    text = lock.encode(made(retest_after="7d")).decode()
    found = text.splitlines()
    assert text.startswith(EXPECTED)
    assert "issued_at = 2026-11-20T12:00:00Z" in found
    assert "expires_at = 2026-12-20T12:00:00Z" in found
    assert [line for line in found if line.startswith("id = ")] == ['id = "a:v1"', 'id = "b:v1"']
    assert sum(line.startswith("[blob.") for line in found) == 1
    assert text.endswith("]\n")
    assert "\r" not in text


def test_a_blob_that_models_share_stands_once_with_the_sources_of_both_in_the_order_of_their_ids() -> None:
    network = Network()
    found = lock.compile(
        network.verified(
            network.model("b:v1", b"shared", urls=["https://b.example.org/x", "https://both.example.org/x"]),
            network.model("a:v1", b"shared", urls=["https://both.example.org/x", "https://a.example.org/x"]),
            sources={"fallback": ["https://f.example.org/{hex}"]},
        )
    )
    ((name, blob),) = found.blob.items()
    assert blob.sources == (
        "https://both.example.org/x", "https://a.example.org/x", "https://b.example.org/x", f"https://f.example.org/{name[7:]}",
    )  # fmt: skip


def test_two_models_of_the_same_files_have_one_recipe_and_other_files_another() -> None:
    network = Network()
    one, two, three = (
        lock.compile(network.verified(network.model(name, data, path="m.gguf"))).model[0]
        for name, data in (("a:v1", b"x"), ("b:v1", b"x"), ("a:v1", b"y"))
    )
    assert one.recipe == two.recipe != three.recipe
    assert (one.name, two.name) == ("a", "b")


def test_a_lock_knows_the_blobs_of_a_model_each_once() -> None:
    network = Network()
    model = network.model("a:v1", b"x")
    model["artifacts"] = [{**model["artifacts"][0], "path": path} for path in ("a.gguf", "copy.gguf")]
    found = lock.compile(network.verified(model))
    assert found.model[0].blobs == tuple(found.blob)


def test_a_locks_digest_is_that_of_its_bytes() -> None:
    data = lock.encode(made())
    assert lock.digest_of(data) == digest.of(data)


def test_an_edited_lock_is_refused_with_the_line_that_differs() -> None:
    found = made()
    data = lock.encode(found).replace(b'state = "enabled"', b'state = "disabled"', 1)
    with pytest.raises(LockMismatch, match="expected 'state = \"enabled\"'") as refusal:
        lock.check(data, found)
    assert "reconcile lock" in refusal.value.hint
    assert refusal.value.exit_code == 4


def test_a_lock_that_ends_early_is_refused_with_the_line_that_is_missing() -> None:
    found = made()
    data = lock.encode(found)
    with pytest.raises(LockMismatch, match="is missing, expected"):
        lock.check(b"\n".join(data.split(b"\n")[:10]), found)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"schema = 1", b"schema = 2\n", b'[blob."sha256:../../x"]\nsize = 1\nsources = []\n'],
)
def test_what_is_no_lock_is_refused(data: bytes) -> None:
    with pytest.raises(LockMismatch):
        lock.decode(data)


def test_a_digest_that_is_none_is_refused_though_the_rest_is_a_lock() -> None:
    data = lock.encode(made())
    with pytest.raises(LockMismatch, match="regex"):
        lock.decode(data.replace(b'[blob."sha256:', b'[blob."sha256:../'))


def test_control_characters_of_a_prompt_survive_and_stay_on_their_line() -> None:
    network = Network()
    prompt = 'a\x00b\x1bc\x7fd\u2028e\nf\r"g"\\h\u00fc'
    found = lock.compile(network.verified(network.model("a:v1") | {"smoke": {"prompt": prompt}}))
    data = lock.encode(found)
    assert lock.decode(data).model[0].smoke.prompt == prompt
    assert b"\x1b" not in data
    assert b"\x00" not in data
