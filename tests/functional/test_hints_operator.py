"""
Each hint that the operator of a network is given, in its situation, and typed (``tests/hints.py``).

Longer than 400 lines because it is one table, a row for each hint.
"""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from reconciler.commands.context import wall_clock
from reconciler.core.snapshot import Snapshot
from reconciler.demo.server import serving
from reconciler.publish import snapshots
from tests import archives, model_files
from tests.hints import Row, Scene, check, quiet_environment, told
from tests.hostile_server import HostileServer, honest
from tests.network import Network, compact, envelope
from tests.node import Ran, run, tiny

URL = "--url https://models.example.org/x.gguf"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys, a signed root, a model and an unsigned snapshot that lists it."""
    folder = tmp_path_factory.mktemp("operator")
    with pytest.MonkeyPatch.context() as patch:
        quiet_environment(patch, folder)
        (folder / "a.gguf").write_bytes(tiny("a"))
        (folder / "b.gguf").write_bytes(tiny("b"))
        for name in ("k", "l"):
            assert run("key", "generate", name, "--no-passphrase").code == 0
        root = ("root", "new", "root.json", "--network", "testnet", "--root-key", "k.pub", "--snapshot-key", "k.pub")
        for line in (
            root,
            ("root", "sign", "root.json", "--key", "k.key"),
            ("snapshot", "new", "s.json", "--network", "testnet"),
            ("snapshot", "add", "s.json", "a:v1", "a.gguf", "--url", "https://models.example.org/a.gguf"),
        ):
            ran = run(*line)
            assert ran.code == 0, ran
    return folder


def write(name: str, data: bytes) -> Callable[[Scene], object]:
    return lambda scene: (scene.folder / name).write_bytes(data)


def folder(name: str, **files: bytes) -> Callable[[Scene], object]:
    def make(scene: Scene) -> None:
        (scene.folder / name).mkdir()
        for file, data in files.items():
            (scene.folder / name / file).write_bytes(data)

    return make


def link(scene: Scene) -> None:
    (scene.folder / "d").mkdir()
    (scene.folder / "d/inner").symlink_to(scene.folder)


def fifo(scene: Scene) -> None:
    (scene.folder / "d").mkdir()
    os.mkfifo(scene.folder / "d/pipe")


def on_a_terminal(*words: str) -> Callable[[Scene], Ran]:
    """Run one command with a terminal as its standard output."""

    def line(scene: Scene) -> Ran:
        ours, theirs = pty.openpty()
        environment = os.environ | {"COLUMNS": "1000", "PYTHONPATH": str(Path(__file__).parents[2])}
        ran = subprocess.run(
            [sys.executable, "-m", "reconciler", *words],
            cwd=scene.folder,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=60,
        )
        os.close(theirs)
        os.close(ours)
        return Ran(ran.returncode, "", ran.stderr.decode())

    return line


def unsigned(**changes: object) -> bytes:
    """Return an unsigned snapshot with *changes* in its only model, or at its top under ``top``."""
    network = Network()
    top = changes.pop("top", {})
    expires = changes.pop("expires", "2099-01-01T00:00:00Z")
    document = network.snapshot_document(network.model("a:v1", **{"urls": ["https://models.example.org/a"], **changes}), **top)  # type: ignore[arg-type]
    return envelope("application/vnd.reconciler.snapshot.v1+json", compact(document | {"expires_at": expires}), ())


def both_enabled() -> bytes:
    """Return a snapshot in which a model and the one that it replaces are enabled."""
    network = Network()
    models = [network.model(name, urls=["https://models.example.org/a"]) for name in ("a:v1", "a:v2")]
    document = network.snapshot_document(models[0], models[1] | {"replaces": ["a:v1"]}, expires_at="2099-01-01T00:00:00Z")
    return envelope("application/vnd.reconciler.snapshot.v1+json", compact(document), ())


def without(module: str, *words: str) -> Callable[[Scene], Ran]:
    """Run one command where *module* cannot be imported."""

    def line(scene: Scene) -> Ran:
        del scene
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            return run(*words)

    return line


def rsa(scene: Scene) -> None:
    assert scene.type("openssl genrsa -out rsa.key 2048").code == 0


def tar_with_a_link_that_leads_out(scene: Scene) -> None:
    (scene.folder / "d").mkdir()
    shutil.copy(scene.folder / "a.gguf", scene.folder / "d/a.gguf")
    (scene.folder / "d/b.gguf").symlink_to("../a.gguf")
    assert scene.type("tar -cf linked.tar d").code == 0


def remove_a_key(file: str) -> Callable[[Scene], Ran]:
    """Remove the last of the root keys of *file*."""
    return lambda scene: run("root", "remove-key", file, run("root", "inspect", file, "--json").json["roles"]["root"]["keyids"][-1])


def other_bytes(scene: Scene) -> Ran:
    """Read a URL that gives other bytes than those that are listed, of the same size."""
    with serving() as server:
        server.add(b"b:v1")
        url = f"{server.address}/sha256/{hashlib.sha256(b'b:v1').hexdigest()}"
        (scene.folder / "s.json").write_bytes(unsigned(urls=[url]))
        return run("snapshot", "lint", "s.json", "--digests")


PROFILE = b'schema = 1\nmemory = "8GiB"\ndisk = "100GiB"\n'
S = {"FILE": "s.json", "NAME": "testnet", "KEY": "k.key"}
ROOT = "root new r.json --network testnet --root-key k.pub --snapshot-key k.pub"
REVIEW = "snapshot sign s.json --key k.key --yes"


def pointing(row: str, name: str, data: bytes) -> Row:
    """Return the row of a file that is published under the name of a GGUF model and is something else."""
    return told(row, f"snapshot add s.json x:v1 {name} {URL}", write(name, data))


GNU_LONG = archives.tar(archives.member(b"x", b"y", kind=b"L"))
ENCRYPTED = archives.zip_of(archives.Zipped(name=b"a", data=b"b", flags=1))


def a_registry(path: str, document: dict[str, object], line: str) -> Callable[[Scene], Ran]:
    """Type *line* while a registry at HOST answers *path* with *document*."""

    def type_(scene: Scene) -> Ran:
        with HostileServer() as server:
            server.on(path, honest(json.dumps(document).encode()))
            host = server.url("").removeprefix("http://").rstrip("/")
            return scene.type(f"reconcile {line.replace('HOST', host)}")

    return type_


INDEX = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.oci.image.index.v1+json",
    "manifests": [
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": f"sha256:{digit * 64}", "size": 1,
         "platform": {"os": "linux", "architecture": name}} for digit, name in (("0", "amd64"), ("1", "arm64"))
    ],
}  # fmt: skip
SPLITS = [write(name, data) for name, data in model_files.split("b").items() if "00002" not in name]

SWARM = "snapshot swarm add s.json --files . --least 1KiB"
TRACKER = "--tracker udp://tracker.example.org:6969/announce"
TORRENTS = f"{SWARM} {TRACKER} --url https://models.example.org/{{hex}}.torrent"


def swarm_without(**changes: object) -> Callable[[Scene], object]:
    """Change the swarm that the snapshot has."""

    def make(scene: Scene) -> None:
        def change(found: Snapshot) -> Snapshot:
            assert found.swarm
            swarm = msgspec.convert(msgspec.to_builtins(found.swarm) | changes, type(found.swarm))
            return msgspec.structs.replace(found, swarm=swarm)

        data = snapshots.edit((scene.folder / "s.json").read_bytes(), change, now=wall_clock()).data
        (scene.folder / "s.json").write_bytes(data)

    return make


def closed(scene: Scene) -> None:
    """Forbid nodes their own sources; the network has none for all files."""

    def change(found: Snapshot) -> Snapshot:
        return msgspec.structs.replace(found, sources=msgspec.structs.replace(found.sources, allow_node_fallback=False))

    data = snapshots.edit((scene.folder / "s.json").read_bytes(), change, now=wall_clock()).data
    (scene.folder / "s.json").write_bytes(data)


def seeding_on_a_taken_port(scene: Scene) -> Ran:
    """Seed, in a process that is ended where it does not end, at a port that is taken for IPv4 and IPv6."""
    both = socket.has_dualstack_ipv6()
    with socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both) as taken:
        arguments = ["swarm", "seed", "s.json", "--files", ".", "--folder", "d", "--ports", str(taken.getsockname()[1])]
        command = [sys.executable, "-m", "reconciler", *arguments]
        ran = subprocess.run(command, cwd=scene.folder, capture_output=True, text=True, timeout=60, check=False)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


ENTRY = {"digest": f"sha256:{'0' * 64}", "size": 9, "info_hash": "0" * 40}
PEERS = [
    told("{algorithm} and {hex} stand for the blob's digest", f"{SWARM} {TRACKER} --url https://models.example.org/x", then=TORRENTS),
    told(
        "--files names a folder with the models' files, as downloaded;",
        TORRENTS.replace("--files .", "--files d"),
        folder("d"),
        then=TORRENTS,
    ),
    told("as in udp://tracker.example.org:6969/announce", f"{SWARM} --tracker udp://tracker.example.org/announce", then=TORRENTS),
    told("give --tracker URL; nodes ask no other than those that the snapshot names", SWARM, then=TORRENTS),
    told("give --url, with {hex} in it, where they are published", f"{SWARM} {TRACKER}", closed, then=TORRENTS),
    Row(
        hint="`reconcile snapshot swarm add FILE --files DIR --tracker URL` makes them",
        line="snapshot swarm whitelist s.json",
        names={"FILE": "s.json", "DIR": ".", "URL": "udp://tracker.example.org:6969/announce --least 1KiB"},
        again=0,
    ),
    Row(
        hint="`reconcile snapshot swarm add FILE --files DIR --tracker URL` names one",
        line="snapshot lint s.json",
        before=(TORRENTS, swarm_without(trackers=())),
        names={"FILE": "s.json", "DIR": ".", "URL": "udp://tracker.example.org:6969/announce"},
    ),
    Row(
        hint="`reconcile snapshot swarm add FILE --files DIR` takes them out",
        line="snapshot lint s.json",
        before=(TORRENTS, swarm_without(torrents={f"sha256:{'0' * 64}": ENTRY})),
        names={"FILE": "s.json", "DIR": "."},
    ),
    told(
        "its port is in use, or it was killed: start it again, with other --ports",
        seeding_on_a_taken_port,
        TORRENTS,
        folder("d"),
    ),
    told("--folder names a folder of this user", "swarm seed s.json --files . --folder gone", TORRENTS),
    Row(
        hint="`reconcile snapshot swarm add FILE --files DIR` writes it again",
        line="swarm seed s.json --files . --folder d",
        before=(TORRENTS, folder("d"), lambda scene: shutil.rmtree(scene.folder / "torrents")),
        names={"FILE": "s.json", "DIR": ". --least 1KiB"},
    ),
    told(
        "publish the torrents at plain addresses",
        "snapshot lint s.json",
        TORRENTS,
        swarm_without(torrents={f"sha256:{'0' * 64}": ENTRY | {"urls": ["https://models.example.org/t?X-Amz-Signature=1"]}}),
    ),
]

ROWS = [
    *PEERS,
    told("name one by its digest: oci://…@sha256:…", a_registry("/v2/x/manifests/t", INDEX, "snapshot add s.json x:v1 oci://HOST/x:t")),
    told("name the model with --entrypoint", f"snapshot add s.json x:v1 b.gguf --role b.gguf=draft {URL}"),
    told(
        "name every split as SOURCE, with the names that the engine's own tool gave them",
        "snapshot add s.json x:v1 tiny-00001-of-00003.gguf tiny-00003-of-00003.gguf --url 'https://h.example.org/{path}'",
        *SPLITS,
    ),
    pointing("convert it with gguf-py's gguf_convert_endian.py: engines here are little-endian", "p.gguf", b"FUGG" + bytes(64)),
    pointing("it was written before GGUF (August 2023): convert it", "p.gguf", b"lmgg" + bytes(64)),
    pointing("pack it again as one of tar, tar.gz, tar.xz, tar.zst, zip", "p.gguf", b"7z\xbc\xaf\x27\x1c" + bytes(64)),
    pointing("convert it to GGUF, for example with llama.cpp's convert_hf_to_gguf.py", "p.gguf", b"\x89HDF\r\n\x1a\n" + bytes(64)),
    pointing("download the file again, and compare its size", "p.gguf", b"%PDF-1.4 " + bytes(64)),
    told(
        "if the model is inside, its publisher adds it with --unpack {}",
        f"snapshot add s.json x:v1 p.gguf {URL}",
        write("p.gguf", b"\x1f\x8b" + bytes(64)),
    ),
    told(
        "leave --record-answer out",
        f"snapshot add s.json x:v1 other.bin --engine other --record-answer {URL}",
        write("other.bin", b"no model"),
        then=f"snapshot add s.json x:v1 other.bin --engine other {URL}",
    ),
    told(
        "change what the message names; nothing was written",
        "snapshot add s.json ../x:v1 b.gguf " + URL,
        then=f"snapshot add s.json x:v1 b.gguf {URL}",
    ),
    Row(
        hint="`reconcile COMMAND --help` shows what the command accepts",
        line="snapshot edit s.json a:v1 --expect-token-ids x",
        names={"COMMAND": "snapshot edit"},
    ),
    Row(
        hint="the model's publisher packs it again with GNU tar, or with `bsdtar --no-read-sparse`",
        before=(write("x.tar", GNU_LONG),),
        line=f"snapshot add s.json x:v1 x.tar --unpack tar --entrypoint a.gguf {URL}",
        names={"bsdtar --no-read-sparse": "tar -cf x.tar a.gguf"},
        again=0,
    ),
    Row(
        hint="the model's publisher packs it again with `zip -X -r`",
        before=(write("x.zip", ENCRYPTED),),
        line=f"snapshot add s.json x:v1 x.zip --unpack zip --entrypoint a.gguf {URL}",
        names={"zip -X -r": "python3 -m zipfile -c x.zip a.gguf" if shutil.which("zip") is None else "zip -X -r x.zip a.gguf"},
        codes=(0, 3),
    ),
    Row(
        hint="`reconcile snapshot set-state FILE {} retired` lets nodes",
        line="snapshot lint s.json",
        before=(write("s.json", both_enabled()),),
        names=S,
    ),
    told("check the address and the network, then type the command again", "snapshot add s.json x:v1 http://127.0.0.1:9/x.gguf"),
    # -- the command line
    Row(hint="see `{} --help`", line="snapshot inspect --nope s.json"),
    Row(hint="`{}` makes one", line="snapshot inspect gone.json", names={"NAME": "testnet"}, again=0),
    told(
        "choose another name; nothing is overwritten", "snapshot new s.json --network testnet", then="snapshot new t.json --network testnet"
    ),
    told(
        "name a file that only you can read with --passphrase-file",
        "key generate m",
        write("p", b"word"),
        then="key generate m --passphrase-file p",
    ),
    told(", or give --no-passphrase", "key generate m", then="key generate m --no-passphrase"),
    told(
        "pipe them to a program, or name a file with --out", on_a_terminal("snapshot", "pae", "s.json"), then="snapshot pae s.json --out p"
    ),
    told("choose another name: a key that is overwritten is lost", "key generate k --no-passphrase", then="key generate m --no-passphrase"),
    told(
        "--no-passphrase leaves the key unencrypted",
        "key generate m --passphrase-file p",
        write("p", b"\n"),
        then="key generate m --no-passphrase",
    ),
    told(
        "write the next version to another file, e.g. --out 2.root.json",
        "root set root.json --expires 300d",
        then="root set root.json --expires 300d --out 2.root.json",
    ),
    Row(hint="see `reconcile fleet enroll --help`", line="fleet enroll statuses"),
    # -- adding a model
    told(
        "they contain: {}",
        f"snapshot add s.json x:v1 x.tar --unpack tar --entrypoint gone.gguf {URL}",
        write("x.tar", archives.honest({"m.gguf": b"m"}, "tar")),
        then=f"snapshot add s.json x:v1 x.tar --unpack tar --entrypoint m.gguf {URL}",
    ),
    told(
        "roles are: {}",
        f"snapshot add s.json x:v1 b.gguf --role b.gguf=nonsense {URL}",
        then=f"snapshot add s.json x:v1 b.gguf --role b.gguf=model {URL}",
    ),
    told(
        "write {path} in place of the file's name",
        f"snapshot add s.json x:v1 b.gguf LICENSE {URL}",
        write("LICENSE", b"free"),
        then="snapshot add s.json x:v1 b.gguf LICENSE --url 'https://models.example.org/{path}'",
    ),
    told(
        "name it with --entrypoint",
        "snapshot add s.json x:v1 one two --engine other --url 'https://models.example.org/{path}'",
        write("one", b"1"),
        write("two", b"2"),
        then="snapshot add s.json x:v1 one two --engine other --entrypoint one --url 'https://models.example.org/{path}'",
    ),
    told(
        "give --path once for each, or not at all",
        "snapshot add s.json x:v1 a.gguf b.gguf --path x.gguf --url 'https://h.example.org/{path}'",
        then="snapshot add s.json x:v1 b.gguf --path x.gguf --url https://h.example.org/x.gguf",
    ),
    told(
        "give its address without it: nodes sign s3:// addresses themselves",
        "snapshot add s.json x:v1 b.gguf --url 'https://h.example.org/b.gguf?X-Amz-Signature=abcdef'",
        then="snapshot add s.json x:v1 b.gguf --url https://h.example.org/b.gguf",
    ),
    told(
        "give files as SOURCE",
        "snapshot add s.json x:v1 x.tar --unpack tar --record-answer " + URL,
        write("x.tar", archives.honest({"m.gguf": b"m"}, "tar")),
    ),
    told(
        "write NAME:VERSION, e.g. mistral-7b-instruct:v1",
        "snapshot add s.json tiny b.gguf",
        then=f"snapshot add s.json tiny:v1 b.gguf {URL}",
    ),
    told("new content needs a new version, e.g. NAME:v2", "snapshot add s.json a:v1 b.gguf", then=f"snapshot add s.json a:v2 b.gguf {URL}"),
    Row(
        hint="the model's publisher packs it again: plain files and folders alone",
        line=f"snapshot add s.json x:v1 linked.tar --unpack tar --entrypoint d/a.gguf {URL}",
        before=(tar_with_a_link_that_leads_out,),
        names={"--hard-dereference": "--hard-dereference -cf linked.tar d"},
        again=0,
    ),
    told(
        "name their paths with --path, once for each file",
        "snapshot add s.json x:v1 d/b.gguf b.gguf --url 'https://h.example.org/{path}'",
        folder("d", **{"b.gguf": b"GGUF"}),
        then="snapshot add s.json x:v1 a.gguf b.gguf --path x --path y --entrypoint x --engine other --url 'https://h.example.org/{path}'",
    ),
    told("they are: {}", f"snapshot add s.json x:v1 b.gguf --role gone.gguf=lora {URL}"),
    told(
        "leave --role out: the header says what the file is for",
        f"snapshot add s.json x:v1 b.gguf --role b.gguf=lora {URL}",
        then=f"snapshot add s.json x:v1 b.gguf {URL}",
    ),
    told("let the download end, or begin it again", f"snapshot add s.json x:v1 b.gguf {URL}", write("b.gguf.aria2", b"x")),
    told(
        "raise --max-size",
        f"snapshot add s.json x:v1 b.gguf --max-size 3 {URL}",
        then=f"snapshot add s.json x:v1 b.gguf --max-size 1GiB {URL}",
    ),
    Row(
        hint="fetch the file itself: `git lfs pull`",
        line=f"snapshot add s.json x:v1 p.gguf {URL}",
        before=(write("p.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"),),
    ),
    Row(
        hint="fetch the file itself: `git annex get`",
        line=f"snapshot add s.json x:v1 p.gguf {URL}",
        before=(write("p.gguf", b"/annex/objects/SHA256E-s12--0.gguf\n"),),
    ),
    told(
        "look at the URL in a browser: it may ask for a login",
        f"snapshot add s.json x:v1 p.gguf {URL}",
        write("p.gguf", b"<!DOCTYPE html><html><title>Log in</title></html>"),
    ),
    told(
        "a bucket's refusal?",
        f"snapshot add s.json x:v1 p.gguf {URL}",
        write("p.gguf", b"<?xml version='1.0'?><Error><Code>No</Code></Error>"),
    ),
    told("a server's refusal?", f"snapshot add s.json x:v1 p.gguf {URL}", write("p.gguf", b'{"error": "no"}')),
    told(
        "give a file, or an address that begins with https://",
        "snapshot add s.json x:v1 ftp://h.example.org/b",
        then=f"snapshot add s.json x:v1 b.gguf {URL}",
    ),
    told(
        "name the one that it replaces with --replaces, or keep all with --beside",
        f"snapshot add s.json a:v3 c.gguf {URL}",
        write("c.gguf", tiny("c")),
        f"snapshot add s.json a:v2 b.gguf --beside {URL}",
        then=f"snapshot add s.json a:v3 c.gguf --beside {URL}",
    ),
    Row(
        hint="copy it with `cp -rL`",
        line="snapshot add s.json x:v1 d --engine other",
        before=(link,),
        names={"cp -rL": "cp -L a.gguf whole.gguf"},
    ),
    told(
        "rename it, or leave it out with --exclude",
        "snapshot add s.json x:v1 d --engine other",
        folder("d", **{"a\\b": b"x", "c": b"y"}),
        then="snapshot add s.json x:v1 d --engine other --entrypoint c --exclude 'a*' --url 'https://h.example.org/{path}'",
    ),
    told("leave it out with --exclude", "snapshot add s.json x:v1 d --engine other", fifo),
    told(
        "there are: {}",
        "snapshot add s.json x:v1 d --engine other --include '*.bin'",
        folder("d", c=b"y"),
        then="snapshot add s.json x:v1 d --engine other --include c --entrypoint c --url 'https://h.example.org/{path}'",
    ),
    Row(hint="`pip install huggingface-hub` installs it", line=without("huggingface_hub", "snapshot", "add", "s.json", "x:v1", "hf://o/r")),
    Row(
        hint="`pip install oras` installs it",
        before=(REVIEW,),
        line=without("oras.oci", "snapshot", "push", "s.json", "oci://127.0.0.1:9/models:stable"),
    ),
    # -- editing
    Row(hint="`reconcile snapshot edit --help` lists the options", line="snapshot edit s.json a:v1"),
    told(
        "a text has quotes, as in --set 'smoke.prompt=\"Hello\"'",
        "snapshot edit s.json a:v1 --set smoke.prompt=Hello",
        then="snapshot edit s.json a:v1 --set 'smoke.prompt=\"Hello\"'",
    ),
    Row(hint="write it as `reconcile snapshot inspect --full FILE` shows it", line="snapshot edit s.json a:v1 --set '..=1'", names=S),
    told(
        "add other content as another version, as in name:v2",
        "snapshot edit s.json a:v1 --set 'artifacts[a.gguf].size=1'",
        then=f"snapshot add s.json a:v2 b.gguf {URL}",
    ),
    told("did you mean {}?", "snapshot edit s.json a:v1 --set smoke.promt=1", then="snapshot edit s.json a:v1 --set 'smoke.prompt=\"x\"'"),
    told("known there: {}", "snapshot edit s.json a:v1 --set smoke.zzz=1"),
    Row(hint="`reconcile snapshot inspect FILE` lists them", line="snapshot set-state s.json gone:v1 archived", names=S),
    # -- documents and keys
    Row(
        hint="`reconcile {} new` makes such a file",
        line="snapshot inspect x",
        before=(write("x", b"x"),),
        names={"snapshot new": "snapshot new y --network testnet"},
    ),
    Row(hint="this is a snapshot: `reconcile snapshot inspect FILE` shows it", line="root inspect s.json", names=S),
    Row(
        hint="this is a trust root: `reconcile root inspect FILE` shows it", line="snapshot inspect root.json", names={"FILE": "root.json"}
    ),
    Row(
        hint="sign the bytes that `reconcile snapshot pae FILE`",
        line="snapshot attach s.json --key k.pub --signature sig",
        before=(write("sig", bytes(64)),),
        names={"snapshot pae FILE": "snapshot pae s.json --out p", "root pae FILE": "root pae root.json --out q"},
    ),
    Row(
        hint="`reconcile key generate FILE` makes one; sign with FILE",
        line="snapshot sign s.json --key k.pub --yes",
        names={"FILE": "m --no-passphrase"},
        then="snapshot sign s.json --key m.key --yes",
    ),
    Row(
        hint="`openssl genpkey -algorithm ed25519` makes one",
        line="snapshot sign s.json --key rsa.key --yes",
        before=(rsa,),
        names={"ed25519": "ed25519 -out e.key"},
        then="snapshot sign s.json --key e.key --yes",
    ),
    Row(
        hint="give the public one: `openssl pkey -in FILE -pubout`",
        names={"FILE": "k.key"},
        line="root new r.json --network testnet --root-key k.key --snapshot-key k.pub",
        then="root new r.json --network testnet --root-key k.pub --snapshot-key k.pub",
    ),
    # -- signing
    Row(
        hint="`reconcile --version --json` lists the words that it knows", line=REVIEW, before=(write("s.json", unsigned(state="frozen")),)
    ),
    told("{} does not stand there", REVIEW, write("s.json", unsigned(models=1))),
    told("did you mean {}?", REVIEW, write("s.json", unsigned(memroy=1))),
    told(
        "enable it, remove it, or add its replacement with --replaces",
        "snapshot lint s.json",
        "snapshot set-state s.json a:v1 retired",
        then=f"snapshot add s.json a:v2 b.gguf --replaces a:v1 {URL}",
    ),
    Row(
        hint="`reconcile snapshot rollout FILE {} --end` ends it",
        line="snapshot lint s.json",
        names=S,
        again=0,
        before=(write("s.json", unsigned(top={"rollouts": {"r": {"models": ["gone:v1"], "per_10000": 1}}})),),
    ),
    Row(
        hint="{}`reconcile snapshot lint FILE` shows all; --no-lint signs it all the same",
        line=REVIEW,
        names=S,
        codes=(0, 1, 2, 3),
        before=(write("s.json", unsigned(top={"rollouts": {"r": {"models": ["gone:v1"], "per_10000": 1}}})),),
        then=f"{REVIEW} --no-lint",
    ),
    told(
        "engines then guess one: add it as an artifact with the role template, or take the task chat out",
        "snapshot lint s.json",
        write("w.bin", b"weights"),
        f"snapshot add s.json x:v1 w.bin --engine other --task chat {URL}",
        then="snapshot edit s.json x:v1 --task completion --smoke-task completion",
    ),
    told("give --network NAME, or --from OLD", "snapshot new n.json", then="snapshot new n.json --network testnet"),
    Row(
        hint="the file was changed since: read it again with `reconcile snapshot inspect --full FILE`",
        names=S,
        line=f"snapshot sign s.json --key k.key --reviewed sha256:{'0' * 64}",
    ),
    Row(
        hint="`reconcile snapshot set FILE --expires 30d` sets a new time of issue",
        line=REVIEW,
        names=S,
        again=0,
        before=(write("s.json", unsigned(top={"issued_at": "2001-01-01T00:00:00Z"}, expires="2001-02-01T00:00:00Z")),),
    ),
    Row(
        hint="`reconcile root inspect FILE` lists who may",
        line="snapshot sign s.json --key l.key --root root.json --yes",
        names={"FILE": "root.json"},
        then="snapshot sign s.json --key k.key --root root.json --yes",
    ),
    Row(
        hint="nodes would refuse it: `reconcile snapshot sign FILE --key KEY` adds a signature",
        names={"KEY": "k.key --yes", "FILE": "s.json"},
        line="snapshot push s.json oci://127.0.0.1:9/models:stable --root root.json",
    ),
    told(
        "nodes look for the newest snapshot under a tag, as in :stable",
        f"snapshot push s.json oci://127.0.0.1:9/models@sha256:{'0' * 64}",
        REVIEW,
    ),
    # -- rollouts
    told(
        "name the models of a new one with --model",
        "snapshot rollout s.json r --share 1%",
        then="snapshot rollout s.json r --model a:v1 --share 1%",
    ),
    Row(hint="`reconcile snapshot inspect FILE` lists them", line="snapshot rollout s.json r --model gone:v1 --share 1%", names=S),
    Row(
        hint="`reconcile snapshot rollout FILE {} --end` ends that one",
        line="snapshot rollout s.json q --model a:v1 --share 1%",
        names=S,
        again=0,
        before=("snapshot rollout s.json r --model a:v1 --share 1%",),
    ),
    told(
        "there are: {}",
        "snapshot rollout s.json gone --end",
        "snapshot rollout s.json r --model a:v1 --share 1%",
        then="snapshot rollout s.json r --end",
    ),
    # -- roots
    Row(
        hint="add the new key first, or lower the threshold with `reconcile root set FILE --{}-threshold N`",
        before=("root new two.json --network testnet --root-key k.pub --root-key l.pub --root-threshold 2 --snapshot-key k.pub",),
        line=remove_a_key("two.json"),
        names={"FILE": "two.json", " N": " 1"},
        again=0,
    ),
    Row(
        hint="give at least the first 8 digits of the key id that `reconcile root inspect FILE` shows",
        names={"FILE": "root.json"},
        line="root remove-key root.json 00 --out 2.root.json",
    ),
    told(
        "a key of the root before signs the next one too: name that root with --previous FILE",
        "root sign 2.root.json --key l.key",
        "root set root.json --expires 300d --out 2.root.json",
    ),
    told(
        "--previous is the root of the version before, as it was published",
        "root sign 3.root.json --key k.key --previous root.json",
        "root set root.json --expires 300d --out 2.root.json",
        "root sign 2.root.json --key k.key",
        "root set 2.root.json --expires 200d --out 3.root.json",
        then="root sign 3.root.json --key k.key --previous 2.root.json",
    ),
    told(
        "write the file of the public key and its label, as in --label 'ci.pub=CI, 2026'",
        f"{ROOT} --label oops",
        then=f"{ROOT} --label 'k.pub=CI, 2026'",
    ),
    told(
        "two keys with one label could not be told apart",
        f"{ROOT} --root-key l.pub --label k.pub=A --label l.pub=A",
        then=f"{ROOT} --root-key l.pub --label k.pub=A --label l.pub=B",
    ),
    told("use --passphrase-file", "key show 'pkcs11:object=k?pin-value=1&module-path=/gone.so'"),
    told("as in 'pkcs11:token=release;object=key2026", "key show pkcs11:object=k"),
    # -- lint
    told(
        "snapshots are public and outlive a signature",
        "snapshot lint s.json",
        write("s.json", unsigned(urls=["https://h.example.org/a?X-Amz-Signature=abcdef"])),
    ),
    told(
        "name that engine as [runtime.NAME] in the settings", "snapshot lint s.json", write("s.json", unsigned(runtime={"engine": "other"}))
    ),
    told(
        "add the licence file as one more SOURCE",
        "snapshot lint s.json",
        write("LICENSE", b"free"),
        then="snapshot add s.json a:v2 b.gguf LICENSE --url 'https://h.example.org/{path}'",
    ),
    Row(
        hint="`reconcile snapshot edit FILE ID --expect-regex REGEX` says what must come out",
        line="snapshot lint s.json",
        names=S | {"ID": "a:v1", "REGEX": "Paris"},
    ),
    Row(
        hint="measure what it needs, and correct it with",
        line="snapshot lint s.json --node n.toml",
        names=S | {"ID": "a:v1", "SIZE": "1MiB"},
        before=(write("n.toml", PROFILE), "snapshot edit s.json a:v1 --gpu-memory 80GiB"),
    ),
    Row(
        hint="`reconcile snapshot test FILE ID --record` records it again, with at least {} tokens and {} positions",
        line="snapshot lint s.json",
        before=("""snapshot edit s.json a:v1 --set 'smoke.expect.answer={"tokens": [1, 2], "sure": [0]}'""",),
        names=S | {"ID": "a:v1", "--record": ". --record"},
        codes=(0, 1),
    ),
    told("every node refuses these bytes", other_bytes),
    Row(
        hint="name a commit in place of the branch",
        names={"snapshot add": "snapshot add --help"},
        line="snapshot lint s.json",
        before=(write("s.json", unsigned(urls=["https://huggingface.co/o/r/resolve/main/a.gguf"])),),
    ),
    told(
        "correct the URL; nodes try the other sources",
        "snapshot lint s.json --online",
        write("s.json", unsigned(urls=["http://127.0.0.1:9/a"])),
    ),
    # -- test
    told(
        "test it on a node",
        "snapshot test s.json x:v1 .",
        write("x.tar", archives.honest({"m.gguf": b"m"}, "tar")),
        f"snapshot add s.json x:v1 x.tar --unpack tar --entrypoint m.gguf {URL}",
    ),
    told("name the folder with its files, or nothing to fetch them", "snapshot test s.json a:v1 b.gguf"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.hint[:60])
def test_what_a_hint_tells_an_operator_works(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    here = tmp_path / "here"
    shutil.copytree(prepared, here)
    quiet_environment(monkeypatch, here)
    check(row, Scene(here, monkeypatch))
