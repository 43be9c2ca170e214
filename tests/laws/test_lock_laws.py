"""Laws of the lock: one snapshot, one file, on any machine; what is read is what was written; no edit passes."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.core import lock, snapshot, trust
from reconciler.core.errors import LockMismatch
from tests.network import Document, Network, compact

DIGEST = "sha256:" + "5" * 64
TEXT = st.text(max_size=40)


def compiled(document: Document) -> lock.Lock:
    """Compile *document* under one digest, so that only what it says can make a difference and not how it is written."""
    found = snapshot.decode(compact(document))
    return lock.compile(trust.Verified(snapshot=found, digest=DIGEST, root_version=1, role="r"))


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """Return snapshots of some models that share blobs, with all fields in use."""
    network = Network()
    count = draw(st.integers(0, 6))
    contents = [draw(st.integers(0, 3)) for _ in range(count)]
    models = [draw(models_of(network, index, content)) for index, content in enumerate(contents)]
    fallback = draw(st.lists(st.sampled_from(["a", "b", "c"]), unique=True, max_size=3))
    changes: Document = {"sources": {"fallback": [f"https://{host}.example.org/{{algorithm}}/{{hex}}" for host in fallback]}}
    if draw(st.booleans()):
        changes["retest_after"] = draw(st.sampled_from(["7d", "90s"]))
    return network.snapshot_document(*models, **changes)


@st.composite
def models_of(draw: st.DrawFn, network: Network, index: int, content: int) -> Document:
    hosts = draw(st.lists(st.sampled_from(["x", "y", "z"]), unique=True, min_size=1, max_size=3))
    urls = [f"https://{host}.example.org/{content}" for host in hosts]
    model = network.model(f"m{index}:v{content}", f"content {content}".encode(), urls=urls)
    more = network.model("more", f"more {content}".encode(), path=draw(st.sampled_from(["z/vocab.json", "a tokenizer", "ü"])))
    artifacts = [*model["artifacts"], *({**one, "role": draw(st.sampled_from(["tokenizer", "adapter"]))} for one in more["artifacts"])]
    expect = {"text": draw(st.none() | TEXT), "min_tokens": draw(st.integers(0, 9)), "tokens": draw(st.none() | st.just([1, 2]))}
    return model | {
        "state": draw(st.sampled_from(["enabled", "disabled", "archived", "paused"])),
        "requires": draw(st.lists(st.sampled_from(["replaces", "moonlight"]), max_size=2)),
        "tasks": draw(st.permutations(["chat", "completion", "embedding", "rerank"])),
        "gpu_memory": draw(st.integers(0, 2**53 - 1)),
        "artifacts": draw(st.permutations(artifacts)),
        "smoke": {"prompt": draw(TEXT), "expect": expect, "seed": draw(st.integers(0, 2**32 - 1))},
    }


@settings(max_examples=150, deadline=None)
@given(documents(), st.randoms(use_true_random=False))
def test_the_lock_depends_on_no_order_of_models_artifacts_tasks_or_keys(document: Document, random_: random.Random) -> None:
    expected = lock.encode(compiled(document))
    models = [shuffled(model, random_) for model in document["models"]]
    random_.shuffle(models)
    assert lock.encode(compiled(shuffled(document | {"models": models}, random_))) == expected


def shuffled(value: Document, random_: random.Random) -> Document:
    """Return *value* with its keys in another order at each depth, and its lists of artifacts and tasks too."""
    items: list[tuple[str, Any]] = [
        (key, shuffled(child, random_) if isinstance(child, dict) else mixed(key, child, random_)) for key, child in value.items()
    ]
    random_.shuffle(items)
    return dict(items)


def mixed(key: str, value: Any, random_: random.Random) -> Any:
    if key == "tasks":
        return random_.sample(value, len(value))
    return [shuffled(one, random_) for one in random_.sample(value, len(value))] if key == "artifacts" else value


@settings(max_examples=200, deadline=None)
@given(documents())
def test_what_is_read_is_what_was_written(document: Document) -> None:
    made = compiled(document)
    data = lock.encode(made)
    assert lock.decode(data) == made
    assert lock.encode(lock.decode(data)) == data
    assert tomllib.loads(data.decode())["network"] == "testnet", "any TOML reader takes it"
    lock.check(data, made)


@settings(max_examples=60, deadline=None)
@given(documents())
def test_the_lock_is_sorted_and_each_blob_stands_once(document: Document) -> None:
    made = compiled(document)
    assert [model.id for model in made.model] == sorted(model.id for model in made.model)
    assert list(made.blob) == sorted(made.blob)
    assert set(made.blob) == {artifact.digest for model in made.model for artifact in model.artifact}
    for blob in made.blob.values():
        assert len(set(blob.sources)) == len(blob.sources)


@settings(max_examples=60, deadline=None)
@given(documents(), st.data())
def test_no_edit_of_a_lock_passes(document: Document, data: st.DataObject) -> None:
    made = compiled(document)
    written = lock.encode(made)
    place = data.draw(st.integers(0, len(written) - 1))
    edit = data.draw(st.sampled_from(["flip", "cut", "insert", "append", "empty", "windows"]))
    bit = 1 << data.draw(st.integers(0, 7))
    edited = {
        "flip": written[:place] + bytes([written[place] ^ bit]) + written[place + 1 :],
        "cut": written[:place] + written[place + 1 :],
        "insert": written[:place] + b" " + written[place:],
        "append": written + b"\n",
        "empty": b"",
        "windows": written.replace(b"\n", b"\r\n"),
    }[edit]
    with pytest.raises(LockMismatch) as found:
        lock.check(edited, made)
    assert re.search(r"\bline|newline|empty|newer version", found.value.message)
    assert found.value.message.isprintable()


_CHILD = """
import sys
from tests.network import Network
from reconciler.core import lock
network = Network()
models = [network.model(f"m{i}:v1", str(i % 7).encode(), tasks=["embedding", "chat", "completion"]) for i in range(20)]
sys.stdout.buffer.write(lock.encode(lock.compile(network.verified(*models))))
"""


def test_the_lock_does_not_depend_on_the_hash_seed_the_locale_or_the_time_zone() -> None:
    root = Path(__file__).parents[2]
    made = set()
    for seed, zone, locale in (("0", "UTC", "C"), ("1", "Asia/Tokyo", "C.UTF-8"), ("4711", "America/New_York", "POSIX")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": locale, "PYTHONPATH": str(root)}
        child = subprocess.run([sys.executable, "-c", _CHILD], env=environment, cwd=root, capture_output=True, check=True, timeout=60)
        made.add(child.stdout)
    (data,) = made
    assert len(lock.decode(data).model) == 20


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_whatever_bytes_a_lock_has_a_named_refusal_comes_out(data: bytes) -> None:
    made = compiled(Network().snapshot_document())
    with pytest.raises(LockMismatch):
        lock.decode(data)
    with pytest.raises(LockMismatch):
        lock.check(data, made)


def test_a_lock_nested_without_end_is_refused() -> None:
    with pytest.raises(LockMismatch):
        lock.decode(b"x = " + b"[" * 100_000)
