"""
Makes the test vectors of ``docs/encodings.md`` from the real code: ``PYTHONPATH=. python docs/vectors/make.py``.

Everything here follows from fixed texts: two runs make the same bytes. A test makes them again and compares, and has readers that share no
code with this program agree with each of them.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from reconciler.core import bundle, digest, dsse, lock, rollout, snapshot, trust
from reconciler.core.bundle import Contents
from reconciler.core.errors import ReconcileError
from reconciler.core.state import ActiveModel, Generation
from reconciler.fetch.bundle import Bundle
from reconciler.fleet import statement
from reconciler.fleet.statement import NodeReport, ReportedModel, ReportedSnapshot
from reconciler.store import trees
from reconciler.store.ledger import Listing
from tests.network import Key, Network, b64, compact, envelope

FOLDER = Path(__file__).parent
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
KEYS = {name: Key(f"vectors/{name}") for name in ("alice", "bob", "carol")}

Document = dict[str, Any]


def main() -> None:
    """Write every vector into the folder named on the command line, else into the one of this file."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, data in vectors().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def vectors() -> dict[str, bytes]:
    """Return every vector by its path."""
    made = {
        "keys.json": _json([{"name": name, "public": key.pem, "keyid": key.id} for name, key in KEYS.items()]),
        "envelopes.json": _json([*_envelopes()]),
        "digests.json": _json([*_digests()]),
        "trees.json": _json([*_trees()]),
        "active.json": _json([*_active()]),
        "bundles.json": _json([*_bundles()]),
        "places.json": _json([*_places()]),
        "root.json": Network("vectors", now=NOW).root() + b"\n",
        "status.json": _status(),
    }
    for name, payload in _snapshots().items():
        verified = trust.Verified(snapshot=snapshot.decode(payload), digest=digest.of(payload), root_version=1, role="")
        made[f"snapshots/{name}.json"] = envelope(trust.SNAPSHOT_TYPE, payload, [KEYS["alice"]]) + b"\n"
        made[f"snapshots/{name}.lock"] = lock.encode(lock.compile(verified))
    return made


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=True).encode() + b"\n"


# -- envelopes ---------------------------------------------------------------------------------------------


def _envelopes() -> Iterable[Document]:
    """Yield envelopes, good and bad, each with what it is checked against and the digest of its payload where it is accepted."""
    payload = b'{"schema":1,"note":"a payload"}'
    kind = trust.SNAPSHOT_TYPE
    alice, bob, carol = KEYS.values()
    good = json.loads(envelope(kind, payload, [alice]))
    first, second = alice.sign(kind, payload), bob.sign(kind, payload)
    wrong = first | {"sig": b64(alice.private.sign(payload))}
    odd = base64.b64encode(b"\xfb\xff\xfe" * 3).decode()
    urls = {"payloadType": kind, "payload": odd, "signatures": [alice.sign(kind, b"\xfb\xff\xfe" * 3)]}
    changed = good | {"payload": b64(payload.replace(b"1", b"2"))}
    loose = good["payload"].rstrip("=")
    cases: list[tuple[str, object, list[Key], int]] = [
        ("one signature of one", good, [alice], 1),
        ("two signatures of two", good | {"signatures": [first, second]}, [alice, bob], 2),
        (
            "two of three, and one of a key that is not known",
            good | {"signatures": [carol.sign(kind, payload), first, second]},
            [alice, bob],
            2,
        ),
        ("an invalid signature beside a valid one", good | {"signatures": [wrong, second]}, [alice, bob], 1),
        ("base64 in the alphabet of URLs", urls | {"payload": odd.replace("+", "-").replace("/", "_")}, [alice], 1),
        ("one signature of two", good, [alice, bob], 2),
        ("one key twice", good | {"signatures": [first, first]}, [alice, bob], 2),
        ("a changed payload", changed, [alice], 1),
        ("another payload type", good | {"payloadType": trust.ROOT_TYPE}, [alice], 1),
        ("a signature over another payload type", good | {"signatures": [alice.sign(trust.ROOT_TYPE, payload)]}, [alice], 1),
        ("a signature over the payload without its type", good | {"signatures": [wrong]}, [alice], 1),
        ("a signature of another key under this key's id", good | {"signatures": [second | {"keyid": alice.id}]}, [alice], 1),
        ("base64 without its padding", good | {"payload": loose}, [alice], 1),
        ("base64 with a line break", good | {"payload": good["payload"][:8] + "\n" + good["payload"][8:]}, [alice], 1),
        ("both alphabets of base64 in one text", urls | {"payload": odd.replace("+", "-", 1)}, [alice], 1),
        ("no signature", good | {"signatures": []}, [alice], 1),
        ("a field that no envelope has", good | {"comment": "x"}, [alice], 1),
        ("a key twice in one object", json.dumps(good).replace('"payload":', '"payload":"","payload":', 1), [alice], 1),
        ("something after the document", json.dumps(good) + "{}", [alice], 1),
    ]
    for name, text, keys, threshold in cases:
        yield _case(name, text if isinstance(text, str) else json.dumps(text), {key.id: key.pem for key in keys}, threshold)


def _case(name: str, text: str, keys: dict[str, str], threshold: int) -> Document:
    known = {keyid: dsse.load_public_key(keyid, pem) for keyid, pem in keys.items()}
    try:
        accepted = digest.of(dsse.verify(text.encode(), trust.SNAPSHOT_TYPE, known, threshold, max_bytes=1 << 20))
    except ReconcileError:
        accepted = ""
    return {"name": name, "envelope": text, "type": trust.SNAPSHOT_TYPE, "keys": keys, "threshold": threshold, "accepted": accepted}


# -- digests -----------------------------------------------------------------------------------------------


def _digests() -> Iterable[Document]:
    for text in ("", "abc", "é\n"):
        yield {"text": text, **{algorithm: digest.of(text.encode(), algorithm) for algorithm in digest.HEX_LENGTHS}}


def _trees() -> Iterable[Document]:
    """Yield trees: files with their contents, the listing that is hashed, and the digest."""
    for contents in (
        {"model.gguf": "weights"},
        {"b/c": "1", "b-c": "2", "b.c": "3", "B": "", "a/é.json": "{}", "z/\uff5e": "4", "z/\U0001f600": "5"},
        {"same-1": "x", "same-2": "x"},
    ):
        names = sorted(contents)
        listing = tuple(Listing(path=n, digest=digest.of(contents[n].encode()), size=len(contents[n].encode())) for n in names)
        text = msgspec.json.encode(listing).decode()
        yield {"files": contents, "listing": text, "digest": trees.digest_of(listing)}


def _active() -> Iterable[Document]:
    """Yield active sets: the tree of each model, the text that is hashed, and the digest."""
    for models in ({}, {"a:v1": digest.of(b"1")}, {"a:v1.1": digest.of(b"2"), "a:v1": digest.of(b"1"), "a-b:v1": digest.of(b"3")}):
        entries = {name: _entry(name, tree) for name, tree in models.items()}
        text = "".join(f"{name} {models[name]}\n" for name in sorted(models))
        yield {"models": models, "text": text, "digest": Generation(number=1, entries=entries).digest}


def _entry(name: str, tree: str) -> ActiveModel:
    runtime = snapshot.Runtime(engine="llama-cpp")
    return ActiveModel(id=name, tasks=("chat",), runtime=runtime, path="", entrypoint="", bytes=0, tree=tree)


def _bundles() -> Iterable[Document]:
    """Yield bundles, good and bad: their files, and the digest of the snapshot's envelope where everything that they name is in them."""
    envelope_text = json.dumps({"payloadType": "x", "payload": "", "signatures": []})
    texts = {"snapshot": envelope_text, "root 2": "a root", "weights": "weights", "é": "é"}
    digests = {name: digest.of(text.encode()) for name, text in texts.items()}
    blobs = {digests[name]: len(texts[name].encode()) for name in ("weights", "é")}
    least = Contents(network="vectors", version=7, envelope=digests["snapshot"])
    whole = msgspec.structs.replace(least, roots=(digests["root 2"],), models=("a:v1", "b:v1"), blobs=blobs)
    second = msgspec.structs.replace(whole, blobs={digests["é"]: 2}, assumes={digests["weights"]: 7})
    made = {name: _bundle_files(contents, texts) for name, contents in (("least", least), ("whole", whole), ("second", second))}
    config = bundle.blob_path(bundle.config_of(made["whole"][bundle.blob_path(_manifest(made["whole"]))].encode()))
    index = json.loads(made["whole"]["index.json"])
    cases = {
        "a snapshot without files": made["least"],
        "a root, and files of two models": made["whole"],
        "without what an earlier bundle holds": made["second"],
        "a file with other bytes": made["whole"] | {bundle.blob_path(digests["weights"]): "Weights"},
        "a file that is missing": {path: text for path, text in made["whole"].items() if path != bundle.blob_path(digests["weights"])},
        "a root with other bytes": made["whole"] | {bundle.blob_path(digests["root 2"]): "another"},
        "a manifest with other bytes": made["whole"] | {bundle.blob_path(_manifest(made["whole"])): "{}"},
        "a config with other bytes": made["whole"] | {config: made["whole"][config].replace('"version":7', '"version":8')},
        "two manifests": made["whole"] | {"index.json": json.dumps(index | {"manifests": index["manifests"] * 2})},
        "no index": {path: text for path, text in made["whole"].items() if path != "index.json"},
        "a later version of the form": _bundle_files(msgspec.structs.replace(least, schema=2), texts),
    }
    for name, files in cases.items():
        yield {"name": name, "files": files, "accepted": _accepted(files)}


def _manifest(files: dict[str, str]) -> str:
    return bundle.manifest_of(files["index.json"].encode())


def _bundle_files(contents: Contents, texts: dict[str, str]) -> dict[str, str]:
    held = {digest.of(text.encode()): text for text in texts.values()}
    named = [contents.envelope, *contents.roots, *contents.blobs]
    documents = bundle.documents(contents, {name: len(text.encode()) for name, text in held.items()})
    return {bundle.blob_path(name): held[name] for name in named} | {path: data.decode() for path, data in documents.items()}


def _accepted(files: dict[str, str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        for path, text in files.items():
            Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, path).write_bytes(text.encode())
        try:
            with Bundle(Path(folder)) as found:
                for name in (found.contents.envelope, *found.contents.roots, *found.contents.blobs):
                    found.read(name, 1 << 20)
                return found.contents.envelope
        except ReconcileError:
            return ""


def _places() -> Iterable[Document]:
    for network, name, node in (
        ("testnet", "2026-12", "7f1b0c9e-5a0e-4f43-9f0c-2d7f6f1f8a11"), ("testnet", "2027-01", "7f1b0c9e-5a0e-4f43-9f0c-2d7f6f1f8a11"),
        ("testnet", "2026-12", "n1"), ("mainnet", "2026-12", "n1"), ("a", "b", "é"),
    ):  # fmt: skip
        yield {"network": network, "rollout": name, "node": node, "place": rollout.place(network, name, node)}


def _status() -> bytes:
    model = ReportedModel(id="a:v1", state="active", reason="up-to-date", tree=digest.of(b"1"), since=NOW)
    failed = ReportedModel(id="b:v1", state="failed", reason="failed-before", attempts=2, detail="smoke-failed: it gave no token")
    report = NodeReport(
        schema=1,
        network="vectors",
        node="node-17",
        key=KEYS["carol"].pem,
        sequence=1_795_176_000_000,
        at=NOW,
        program="0.2.0",
        snapshot=ReportedSnapshot(version=7, digest=digest.of(b"snapshot")),
        lock=digest.of(b"lock"),
        generation=3,
        active_digest=digest.of(b"active"),
        models=(model, failed),
        cohorts=("canary",),
    )
    return statement.sign(report, KEYS["carol"].private)


# -- snapshots ---------------------------------------------------------------------------------------------


def _artifact(path: str, **changes: Any) -> Document:
    return {"path": path, "digest": digest.of(path.encode()), "size": len(path), "urls": ["https://hub.example.org/x"]} | changes


def _model(name: str, *artifacts: Document, version: str = "v1", **changes: Any) -> Document:
    engine = {"engine": "llama-cpp"}
    return {
        "name": name, "version": version, "tasks": ["completion"], "runtime": engine, "artifacts": list(artifacts),
        "entrypoint": artifacts[0]["path"],
    } | changes  # fmt: skip


def _snapshots() -> dict[str, bytes]:
    base = {"schema": 1, "network": "vectors", "version": 7, "issued_at": "2026-11-20T00:00:00Z", "expires_at": "2026-12-20T00:00:00Z"}
    return {
        "empty": compact(base | {"models": []}),
        "least": compact(base | {"models": [_model("a", _artifact("a.gguf"))]}),
        "order": compact(base | {"models": _unsorted(), "sources": {"fallback": ["https://m.example.org/{algorithm}/{hex}"]}}),
        "texts": compact(base | {"models": _texts()}),
        "numbers": compact(base | {"models": _numbers()}),
        "newer": compact(base | {"models": _newer(), "later": {"x": [1.5, None]}}),
        "whole": compact(base | _whole()),
    }


def _unsorted() -> list[Document]:
    """Models, artifacts and tasks out of order; a blob that two models share; paths that two orders of text sort differently."""
    shared = {"digest": digest.of(b"shared"), "size": 6}
    paths = ("z", "a/b", "a.b", "a-b", "é", "\U0001f600", "\uff5e", "B")
    first = _model(
        "z",
        _artifact("w.gguf", **shared, urls=["https://z.example.org/1", "https://b.example.org/2"]),
        tasks=["embedding", "completion", "chat"],
    )
    second = _model("a", *(_artifact(path) for path in paths), _artifact("s", **shared, urls=["https://b.example.org/2"]), version="v10")
    return [first, second, _model("a", _artifact("n.gguf"), version="v9"), _model("a-b", _artifact("n.gguf"))]


def _texts() -> list[Document]:
    odd = 'quote " backslash \\ tab \t line \n return \r form \f back \b null \u0001 unit \u001f delete \u007f é \u2028 \U0001f600'
    return [_model("a", _artifact("a.gguf"), smoke={"prompt": odd, "expect": {"text": "'''", "regex": '"""\\d+$'}})]


def _numbers() -> list[Document]:
    floats = [
        0.1,
        -0.0,
        0,
        1,
        1e-7,
        1.5e-5,
        0.0001,
        123456.789,
        1e15,
        1e16,
        123456789012345680.0,
        1e22,
        5e-324,
        1.7976931348623157e308,
        1 / 3,
    ]
    vector = {"answer": {"embedding": floats, "cosine": 1}, "dimension": len(floats)}
    greedy = {"answer": {"tokens": [1, 2, 3], "sure": [0, 2]}, "tokens": [], "min_tokens": 1, "min_rate": 3}
    ruled = {"answer": {"tokens": [7], "sure": [0], "prompt": [2, 9], "margin": 1, "version": 1}}
    return [
        _model("a", _artifact("a.gguf"), gpu_memory=2**53 - 1, memory=1, smoke={"seed": 2**32 - 1, "expect": vector}),
        _model("b", _artifact("b.gguf"), smoke={"max_tokens": 4096, "timeout": "1.5m", "expect": greedy}),
        _model("c", _artifact("c.gguf"), smoke={"expect": {"answer": None}}),
        _model("d", _artifact("d.gguf"), smoke={"expect": ruled}),
    ]


def _newer() -> list[Document]:
    """Return what no version of the program knows yet: fields, words, and a digest so short that tables fit in lines."""
    words: Document = {
        "state": "paused",
        "tasks": ["sing", "completion"],
        "requires": ["teleport", "replaces", "teleport"],
        "colour": {"a": 1},
    }
    short = {"digest": "md9:" + "0" * 32, "unpack": "rar", "flavour": 1}
    return [_model("a", _artifact("a.gguf") | short, **words), _model("b", _artifact("b.gguf"), entrypoint="b.gguf")]


def _whole() -> Document:
    archive = _artifact("w.tar.gz", unpack="tar.gz", role="model")
    old = _model("llm", _artifact("old.gguf"), state="retired")
    new = _model("llm", archive, _artifact("mm proj.gguf", role="mmproj"), version="v2", replaces=["llm:v1"], requires=["replaces"])
    return {
        "issued_at": "2026-11-20T02:30:00.999+02:30",
        "retest_after": "7d",
        "names": {"llm": "v2"},
        "rollouts": {"2026-12": {"models": ["llm:v2"], "per_10000": 100, "cohorts": ["lab", "canary", "lab"]}, "a b": {}},
        "sources": {
            "fallback": ["https://m.example.org/{hex}", "https://n.example.org/{algorithm}/{hex}"],
            "allow_node_fallback": False,
            "redirects": {"hub.example.org": ["*.example.net", "*.example.com"]},
        },
        "models": [new | {"entrypoint": "w/model.gguf"}, old, _model("off", _artifact("o"), state="disabled")],
    }


if __name__ == "__main__":
    main()
