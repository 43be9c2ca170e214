"""Bundles: from a node with a network to nodes without one, over a disk that anybody may have written to."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from datetime import timedelta
from pathlib import Path

import pytest

from reconciler.commands import bundle as commands
from reconciler.commands.context import RunOptions, wall_clock
from reconciler.core.errors import BadBundle, Expired
from reconciler.demo.server import Server
from reconciler.fetch.bundle import Bundle
from tests.node import Node, Prototype, Ran, deaf, flip, run, tiny

ITEMS = ("a:v1", "b:v1")


def bundle(node: Node, command: str, *arguments: str) -> Ran:
    return run("bundle", command, "--config", str(node.folder / "reconcile.toml"), *arguments)


@pytest.fixture(scope="module")
def with_items(running_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Prototype:
    return Prototype(tmp_path_factory.mktemp("online"), running_server, a=tiny("a:v1"), b=tiny("b:v1"))


@pytest.fixture
def online(node: Node, with_items: Prototype) -> Node:
    with_items.copy_to(node)
    return node


@pytest.fixture
def offline(tmp_path: Path, server: Server, online: Node) -> Node:
    """A node of the same network, on which nothing was installed yet."""
    made = Node(tmp_path / "offline", server)
    made.network = online.network
    (made.folder / "root.json").write_bytes((online.folder / "root.json").read_bytes())
    return made


@pytest.fixture(params=["bundle.tar", "bundle"])
def target(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return tmp_path / str(request.param)


def export(node: Node, target: Path, *arguments: str) -> Path:
    ran = bundle(node, "export", str(target) if target.suffix else f"{target}/", *arguments)
    assert ran.code == 0, ran
    return target


def blob_of(data: bytes) -> str:
    return f"blobs/sha256/{hashlib.sha256(data).hexdigest()}"


def spoil(target: Path, data: bytes) -> None:
    """Change one byte of the blob of *data* in a bundle."""
    if target.is_dir():
        path = target / blob_of(data)
        path.chmod(0o644)
        flip(path)
        return
    with tarfile.open(target) as tar:
        at = tar.getmember(blob_of(data)).offset_data + 100
    with target.open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))


def test_a_bundle_brings_a_node_without_a_network_to_active(online: Node, offline: Node, target: Path, server: Server) -> None:
    export(online, target)
    server.files.clear()

    ran = bundle(offline, "import", str(target))

    assert ran.code == 0, ran
    assert offline.active() == online.active()
    assert offline.run("status", "--json").json["active_digest"] == online.run("status", "--json").json["active_digest"]
    assert offline.run("verify").code == 0
    assert offline.run("plan", "--detailed-exitcode").code == 0
    assert bundle(offline, "import", str(target)).code == 0, "once more changes nothing"


def test_the_same_content_makes_the_same_bytes(online: Node, tmp_path: Path) -> None:
    assert export(online, tmp_path / "one.tar").read_bytes() == export(online, tmp_path / "two.tar").read_bytes()


def test_a_bundle_is_an_oci_image_layout(online: Node, tmp_path: Path) -> None:
    """As the image specification has it: oci-layout, an index, and every descriptor leads to a blob of its digest and size."""
    folder = export(online, tmp_path / "bundle")

    assert json.loads((folder / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    (found,) = json.loads((folder / "index.json").read_bytes())["manifests"]
    manifest = json.loads((folder / "blobs" / found["digest"].replace(":", "/")).read_bytes())
    assert manifest["schemaVersion"] == 2
    for one in (found, manifest["config"], *manifest["layers"]):
        data = (folder / "blobs" / one["digest"].replace(":", "/")).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (one["size"], one["digest"].partition(":")[2])


def test_since_leaves_out_what_earlier_bundles_hold(online: Node, offline: Node, tmp_path: Path) -> None:
    first = export(online, tmp_path / "1.tar")
    bundle(offline, "import", str(first))
    names = list(ITEMS)
    for turn, new in enumerate(("c:v1", "d:v1"), 2):
        names.append(new)
        online.publish(*(online.item(name, tiny(name)) for name in names))
        assert online.run("apply").code == 0
        export(online, tmp_path / f"{turn}.tar", "--since", str(tmp_path / f"{turn - 1}.tar"))
        with Bundle(tmp_path / f"{turn}.tar") as made:
            assert len(made.contents.blobs) == 1
            assert len(made.contents.assumes) == turn

        assert bundle(offline, "import", str(tmp_path / f"{turn}.tar")).code == 0

        assert offline.active() == sorted(names)


def test_a_bundle_whose_earlier_one_was_not_imported_says_so(online: Node, offline: Node, tmp_path: Path) -> None:
    first = export(online, tmp_path / "1.tar")
    online.publish(*(online.item(name, tiny(name)) for name in (*ITEMS, "c:v1")))
    assert online.run("apply").code == 0
    second = export(online, tmp_path / "2.tar", "--since", str(first))

    ran = bundle(offline, "import", str(second))

    assert ran.code == 3, ran
    assert offline.active() == ["c:v1"]
    said = offline.run("status", "a:v1").out
    assert "an earlier bundle does" in said
    assert "export a bundle without --since and import that; bundles with --since are imported in the order" in " ".join(said.split())
    assert offline.states()["a:v1"] == "absent"
    assert bundle(offline, "import", str(first)).code == 4, "an older snapshot is a rollback, wherever it comes from"
    assert offline.active() == ["c:v1"]
    assert bundle(offline, "import", str(export(online, tmp_path / "whole.tar"))).code == 0
    assert len(offline.active()) == 3


def test_only_exports_the_files_of_the_named_models(online: Node, offline: Node, target: Path) -> None:
    export(online, target, "--only", "b:v1")

    ran = bundle(offline, "import", str(target), "--only", "b:v1")

    assert ran.code == 0, ran
    assert offline.active() == ["b:v1"]
    assert bundle(online, "export", str(target), "--only", "x:v1").code == 64


def test_a_flipped_byte_fails_its_blob_and_no_other(online: Node, offline: Node, target: Path) -> None:
    export(online, target)
    spoil(target, tiny("a:v1"))

    ran = bundle(offline, "import", str(target))

    assert ran.code == 3, ran
    assert offline.active() == ["b:v1"]
    assert "hash-mismatch" in offline.kinds()
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in offline.blobs())


def test_a_missing_blob_is_no_fault_of_the_model(online: Node, offline: Node, tmp_path: Path) -> None:
    folder = export(online, tmp_path / "bundle")
    (folder / blob_of(tiny("a:v1"))).unlink()

    assert bundle(offline, "import", str(folder)).code == 3

    assert offline.active() == ["b:v1"]
    assert offline.states()["a:v1"] == "absent"


def test_an_interrupted_import_goes_on_where_it_ended(online: Node, offline: Node, target: Path) -> None:
    export(online, target)
    data = tiny("a:v1")
    part = offline.store / "staging" / f"sha256-{hashlib.sha256(data).hexdigest()}" / "bundle"
    part.parent.mkdir(parents=True)
    part.write_bytes(data[: len(data) // 2])

    assert bundle(offline, "import", str(target)).code == 0

    assert offline.active() == list(ITEMS)


@pytest.mark.parametrize("left", [b"other bytes", b"longer " * 100_000], ids=["other", "longer"])
def test_what_an_interrupted_import_left_is_not_believed(online: Node, offline: Node, target: Path, left: bytes) -> None:
    export(online, target)
    part = offline.store / "staging" / f"sha256-{hashlib.sha256(tiny('a:v1')).hexdigest()}" / "bundle"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)

    ran = bundle(offline, "import", str(target))

    assert ran.code == 0, ran
    assert "hash-mismatch" not in offline.kinds(), "the bundle is not at fault"


def test_an_expired_snapshot_is_refused_from_a_bundle_too(online: Node, offline: Node, target: Path) -> None:
    export(online, target)
    context = offline.context(lambda: wall_clock() + timedelta(days=100))

    with pytest.raises(Expired):
        commands.import_bundle(context, target, deaf, RunOptions(offline=True))

    assert not offline.blobs()


@pytest.mark.parametrize("other", ["another network", "edited"])
def test_an_envelope_that_the_network_did_not_sign_is_refused(online: Node, offline: Node, tmp_path: Path, other: str) -> None:
    folder = export(online, tmp_path / "bundle")
    if other == "another network":
        (offline.folder / "root.json").write_bytes(type(offline.network)("elsewhere").root())
    else:
        with Bundle(folder) as made:
            path = folder / "blobs" / made.contents.envelope.replace(":", "/")
        path.chmod(0o644)
        flip(path)

    ran = bundle(offline, "import", str(folder))

    assert ran.code in {1, 4}, ran
    assert not offline.blobs()


def test_a_damaged_blob_is_not_exported(online: Node, target: Path) -> None:
    flip(next(path for path in online.blobs() if path.read_bytes() == tiny("b:v1")))

    ran = bundle(online, "export", str(target) if target.suffix else f"{target}/")

    assert ran.code == 1
    assert "blob-damaged" in ran.err
    assert not target.exists() or not (target / "index.json").exists()


def test_an_interrupted_export_to_a_folder_goes_on(online: Node, offline: Node, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    (folder / blob_of(tiny("a:v1"))).parent.mkdir(parents=True)
    (folder / blob_of(tiny("a:v1"))).write_bytes(tiny("a:v1")[:100])
    with pytest.raises(BadBundle):
        Bundle(folder)

    export(online, folder)

    assert bundle(offline, "import", str(folder)).code == 0


def test_a_model_that_this_node_does_not_have_is_named(online: Node, tmp_path: Path) -> None:
    online.publish(*(online.item(name, tiny(name)) for name in (*ITEMS, "c:v1")))

    ran = bundle(online, "export", str(tmp_path / "bundle.tar"))

    assert ran.code == 1
    assert "this node lacks 1 blob of c:v1" in ran.err
    assert not list(tmp_path.glob("bundle.tar*"))


def test_a_bundle_on_a_disk_that_nobody_may_write_to(online: Node, offline: Node, target: Path) -> None:
    export(online, target)
    before = {path: path.lstat().st_mtime_ns for path in (target, *target.rglob("*"))}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)

    assert bundle(offline, "import", str(target)).code == 0

    assert {path: path.lstat().st_mtime_ns for path in (target, *target.rglob("*"))} == before


def test_import_needs_no_interface_but_loopback(online: Node, offline: Node, target: Path) -> None:
    export(online, target)
    line = [sys.executable, "-m", "reconciler", "bundle", "import", "--config", str(offline.folder / "reconcile.toml"), str(target)]
    namespace = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine gives no network namespace: unshare --net --map-root-user")

    ran = subprocess.run([*namespace, *line], capture_output=True, text=True, check=False)

    assert ran.returncode == 0, ran
    assert offline.active() == list(ITEMS)


# -- what is no bundle -----------------------------------------------------------------------------


def tar_of(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def header(size: bytes) -> bytes:
    """Return a tar header whose size field is *size*."""
    return b"index.json".ljust(124, b"\0") + size.ljust(12, b"\0") + b" " * 21 + b"0".ljust(100, b"\0") + b"ustar\x0000" + bytes(247)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a tar" * 1000,
        tar_of({"index.json": b"{}"}),
        tar_of({"index.json": b"[" * 100_000}),
        tar_of({"index.json": json.dumps({"manifests": [{"mediaType": "x", "digest": "sha256:" + "0" * 64, "size": 1}]}).encode()}),
        tar_of({"index.json": json.dumps({"manifests": [{"mediaType": "x", "digest": "../../etc/passwd", "size": 1}]}).encode()}),
        tar_of({"../index.json": b"{}"}),
        header(b"77777777777"),
        header(b"-0000000512"),
        header(b"\x80" + bytes(10) + b"\x01"),
        header(b"\xff" * 12),
    ],
    ids=[
        "empty",
        "no tar",
        "no index",
        "deep",
        "dangling",
        "traversal",
        "outside",
        "too long",
        "negative",
        "base-256",
        "base-256 negative",
    ],
)
def test_what_is_no_bundle_is_refused_and_nothing_is_written(online: Node, offline: Node, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data)

    ran = bundle(offline, "import", str(path))

    assert ran.code == 1, ran
    assert "bad-bundle" in ran.err
    assert not offline.blobs()


def test_an_image_of_something_else_is_no_bundle(tmp_path: Path) -> None:
    config = b"{}"
    made = {"config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": _name(config), "size": 2}, "layers": []}
    manifest = json.dumps(made).encode()
    index = json.dumps({"manifests": [{"mediaType": "m", "digest": _name(manifest), "size": len(manifest)}]}).encode()
    path = tmp_path / "image.tar"
    path.write_bytes(tar_of({"index.json": index, blob_of(manifest): manifest, blob_of(config): config}))

    with pytest.raises(BadBundle, match="something else"):
        Bundle(path)


def _name(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_a_link_in_a_folder_is_not_followed(online: Node, offline: Node, tmp_path: Path) -> None:
    folder = export(online, tmp_path / "bundle")
    path = folder / blob_of(tiny("a:v1"))
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")

    assert bundle(offline, "import", str(folder)).code == 3

    assert offline.active() == ["b:v1"]
