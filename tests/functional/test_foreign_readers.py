"""
Readers that share no code with this program agree with it: on every test vector, and on the store of a node that lives.

One is the shell script of ``docs/how-to/check-by-hand.md`` (openssl, jq, sha256sum), the other ``docs/vectors/reader.mjs`` (Node).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.network import Key
from tests.node import Node, flip, tiny

TOP = Path(__file__).parents[2]
VECTORS = TOP / "docs" / "vectors"
READER = VECTORS / "reader.mjs"
PAGE = (TOP / "docs" / "how-to" / "check-by-hand.md").read_text()
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed here: apt install nodejs")
needs_jq = pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed here: apt install jq")


def load(name: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((VECTORS / name).read_bytes())
    return found


def reader(*words: object, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["node", str(READER), *map(str, words)], input=given, capture_output=True, timeout=60)


def answer(*words: object, given: bytes = b"") -> str:
    ran = reader(*words, given=given)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.decode().strip()


def script(folder: Path) -> subprocess.CompletedProcess[str]:
    (body,) = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return subprocess.run(["sh", "-c", body, "check-node.sh", str(folder)], capture_output=True, text=True, timeout=120)


# -- the vectors -----------------------------------------------------------------------------------------------


def test_the_vectors_are_what_the_code_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(VECTORS / "make.py"), str(tmp_path)], check=True, env={"PYTHONPATH": str(TOP)}, timeout=60)
    made = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kept = {str(path.relative_to(VECTORS)): path.read_bytes() for path in VECTORS.rglob("*") if path.suffix in {".json", ".lock"}}
    assert made == kept


def test_the_reader_is_short() -> None:
    assert len(READER.read_text().splitlines()) <= 200


@needs_node
@pytest.mark.parametrize("case", load("envelopes.json"), ids=lambda case: case["name"])
def test_the_reader_accepts_and_refuses_the_same_envelopes(tmp_path: Path, case: dict[str, object]) -> None:
    keys = case["keys"]
    assert isinstance(keys, dict)
    for index, pem in enumerate(keys.values()):
        (tmp_path / f"{index}.pub").write_text(pem)
    given = str(case["envelope"]).encode()
    ran = reader("verify", case["type"], case["threshold"], *sorted(tmp_path.glob("*.pub")), given=given)
    assert (ran.stdout.decode().strip() if ran.returncode == 0 else "") == str(case["accepted"]).removeprefix("sha256:"), ran.stderr


@needs_node
@pytest.mark.parametrize("name", sorted(path.stem for path in (VECTORS / "snapshots").glob("*.json")))
def test_the_reader_compiles_the_same_locks(name: str) -> None:
    payload = reader("payload", given=(VECTORS / "snapshots" / f"{name}.json").read_bytes()).stdout
    assert reader("lock", given=payload).stdout == (VECTORS / "snapshots" / f"{name}.lock").read_bytes()


@needs_node
def test_the_reader_computes_the_same_digests_and_places(tmp_path: Path) -> None:
    for index, case in enumerate(load("trees.json")):
        files = case["files"]
        assert isinstance(files, dict)
        for path, text in files.items():
            (tmp_path / str(index) / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(index) / path).write_text(text)
        assert answer("tree", tmp_path / str(index)) == case["digest"]
    for case in load("places.json"):
        assert answer("place", case["network"], case["rollout"], case["node"]) == str(case["place"])


@needs_node
def test_the_reader_verifies_a_status(tmp_path: Path) -> None:
    data = (VECTORS / "status.json").read_bytes()
    payload = reader("payload", given=data).stdout
    (tmp_path / "key").write_text(json.loads(payload)["key"])
    assert answer("verify", json.loads(data)["payloadType"], 1, tmp_path / "key", given=data) == hashlib.sha256(payload).hexdigest()


@needs_node
@pytest.mark.parametrize("case", load("bundles.json"), ids=lambda case: case["name"])
def test_the_reader_accepts_and_refuses_the_same_bundles(tmp_path: Path, case: dict[str, object]) -> None:
    files = case["files"]
    assert isinstance(files, dict)
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(text.encode())
    ran = reader("bundle", tmp_path)
    assert (ran.stdout.decode().strip() if ran.returncode == 0 else "") == case["accepted"], ran.stderr


def test_the_texts_that_are_hashed_have_the_digests_that_are_named() -> None:
    for name in ("trees.json", "active.json"):
        for case in load(name):
            text = str(case.get("listing", case.get("text")))
            assert f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" == case["digest"]
    for key in load("keys.json"):
        der = subprocess.run(["openssl", "pkey", "-pubin", "-outform", "DER"], input=str(key["public"]).encode(), capture_output=True)
        assert hashlib.sha256(der.stdout).hexdigest() == key["keyid"]


# -- a node that lives -------------------------------------------------------------------------------------------


def active_digest(node: Node) -> str:
    found: str = node.run("status", "--json").json["active_digest"]
    return found


@needs_node
def test_the_reader_tells_whether_two_nodes_are_equal_before_and_after_an_update(node: Node, tmp_path: Path) -> None:
    other = Node(tmp_path / "other", node.server)
    models = [node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"))]
    node.publish(*models)
    other.publish(*reversed(models))
    for one in (node, other):
        assert one.run("apply").code == 0
        assert answer("node", one.store) == active_digest(one)
    assert answer("equal", node.store, other.store) == "equal"
    node.publish(*models, node.item("c:v1", tiny("c")))
    assert node.run("apply").code == 0
    assert answer("node", node.store) == active_digest(node)
    ran = reader("equal", node.store, other.store)
    assert (ran.returncode, ran.stdout) == (2, b"different\n")
    payload = reader("payload", given=(node.folder / "snapshot.json").read_bytes()).stdout
    assert reader("lock", given=payload).stdout == (node.folder / "models.lock").read_bytes()


@needs_node
def test_the_reader_takes_a_bundle_of_a_node_before_and_after_an_update_and_sees_a_changed_byte(node: Node, tmp_path: Path) -> None:
    for number, models in enumerate(([node.item("a:v1", tiny("a"))], [node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"))])):
        node.publish(*models)
        assert node.run("apply").code == 0
        folder = tmp_path / f"bundle-{number}"
        assert node.run("bundle export", f"{folder}/").code == 0
        envelope = hashlib.sha256((node.folder / "snapshot.json").read_bytes()).hexdigest()
        assert answer("bundle", folder) == f"sha256:{envelope}"
    flip(folder / "blobs/sha256" / hashlib.sha256(tiny("b")).hexdigest())
    assert b"has other bytes" in reader("bundle", folder).stderr


@needs_jq
def test_the_script_finds_the_active_digest_before_and_after_an_update(node: Node) -> None:
    for models in ([node.item("a:v1", tiny("a"))], [node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"))]):
        node.publish(*models)
        assert node.run("apply").code == 0
        ran = script(node.folder)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines()[-1] == f"active {active_digest(node)}"


@needs_jq
@needs_node
def test_labels_of_keys_change_nothing_for_readers_that_do_not_know_them(node: Node) -> None:
    (key,) = node.network.snapshot_keys
    labelled = node.network.root(labels={key.id: "release key, 2026"})
    (node.folder / "root.json").write_bytes(labelled)
    (node.folder / "root.pub").write_text(node.network.root_keys[0].pem)
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    ran = script(node.folder)
    assert ran.stdout.splitlines()[-1] == f"active {active_digest(node)}", ran.stderr
    kind = json.loads(labelled)["payloadType"]
    payload = reader("payload", given=labelled).stdout
    assert answer("verify", kind, 1, node.folder / "root.pub", given=labelled) == hashlib.sha256(payload).hexdigest()


@needs_jq
def test_the_script_refuses_what_nobody_signed(used: Node) -> None:
    good = (used.folder / "snapshot.json").read_bytes()
    document = json.loads(good)
    document["signatures"][0]["sig"] = document["signatures"][0]["sig"].replace("A", "B", 1)[::-1]
    for changed in (used.network.snapshot(signers=[Key("thief")]), json.dumps(document).encode()):
        (used.folder / "snapshot.json").write_bytes(changed)
        assert "signed the snapshot" in script(used.folder).stderr
    (used.folder / "snapshot.json").write_bytes(used.network.snapshot())
    assert "of another snapshot" in script(used.folder).stderr


@needs_jq
def test_the_script_and_the_reader_see_a_changed_byte(used: Node) -> None:
    flip(next((used.store / "active" / "models" / "a" / "v1").glob("*.gguf")))
    assert "does not have the signed files" in script(used.folder).stderr
