"""
Each hint that whoever runs a node is given, in its situation, and typed (``tests/hints.py``).

Longer than 400 lines because it is one table, a row for each hint.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from reconciler.agent import service
from reconciler.commands import status as status_command
from reconciler.commands.status import Health
from reconciler.core.errors import SandboxUnavailable
from reconciler.demo import network
from reconciler.fetch import aria2_daemon, transfer
from reconciler.runtime import devices, engines
from reconciler.sandbox import choose as sandboxes
from reconciler.sandbox.choose import ProbeResult
from tests import fleet
from tests.hints import Row, Scene, check, quiet_environment, told
from tests.hostile_server import HostileServer, honest
from tests.network import Key, Network
from tests.node import Node, Ran, flip, later, run, tiny

Step = Callable[[Scene], object]


# -- situations --------------------------------------------------------------------------------------------


def write(name: str, data: bytes) -> Step:
    return lambda scene: (scene.folder / name).write_bytes(data)


def remove(name: str) -> Step:
    return lambda scene: (scene.folder / name).unlink()


def a_folder(name: str) -> Step:
    def make(scene: Scene) -> None:
        (scene.folder / name).unlink(missing_ok=True)
        (scene.folder / name).mkdir()

    return make


def settings(extra: str) -> Step:
    return lambda scene: scene.node.configure(extra)


def pointed_at(snapshot: str, extra: str = "") -> Step:
    text = f'[network]\nsnapshot = "{snapshot}"\n\n[store]\nreserve = "1MiB"\n{extra}'
    return write("reconcile.toml", text.encode())


def replaced(old: str, new: str) -> Step:
    def make(scene: Scene) -> None:
        path = scene.folder / "reconcile.toml"
        path.write_text(path.read_text().replace(old, new))

    return make


def published(*names: str, **changes: Any) -> Step:
    """Publish and lock the models *names*, the first as it is there."""
    return lambda scene: scene.node.publish(*(scene.node.item(name, tiny(name.partition(":")[0])) for name in names), **changes)


def put(envelope: Callable[[Scene], bytes]) -> Step:
    """Put a snapshot where the node finds it, and lock nothing."""
    return lambda scene: (scene.folder / "published.json").write_bytes(envelope(scene))


def with_a_dead_source(scene: Scene) -> None:
    node = scene.node
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"), urls=[f"http://127.0.0.1:{closed_port()}/b"]))


def of_an_engine(name: str, **needs: Any) -> Step:
    def make(scene: Scene) -> None:
        node = scene.node
        node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"), runtime={"engine": name}, **needs))

    return make


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def patched(line: str, *changes: tuple[object, str, object]) -> Callable[[Scene], Ran]:
    """Type *line* while attributes of this process are others."""

    def type_(scene: Scene) -> Ran:
        with pytest.MonkeyPatch.context() as patch:
            for target, name, value in changes:
                patch.setattr(target, name, value)
            return scene.type(f"reconcile {line}")

    return type_


def at(line: str, **away: float) -> Callable[[Scene], Ran]:
    """Type *line* by a clock that is so far away."""

    def clock() -> datetime:
        return datetime.now(UTC) + timedelta(**away)

    def type_(scene: Scene) -> Ran:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("reconciler.commands.context.wall_clock", clock)
            patch.setattr("reconciler.commands.context.from_settings.__kwdefaults__", {"clock": clock})
            return scene.type(f"reconcile {line}")

    return type_


def after(line: str, **span: float) -> Callable[[Scene], Ran]:
    """Type *line* after the machine has run for so much longer."""

    def type_(scene: Scene) -> Ran:
        with later(**span) as clock, pytest.MonkeyPatch.context() as patch:
            patch.setattr("reconciler.commands.context.from_settings.__kwdefaults__", {"clock": clock})
            return scene.type(f"reconcile {line}")

    return type_


def damaged_generation(scene: Scene) -> None:
    published("a:v1", "b:v1")(scene)
    assert run("apply", "--yes").code == 0
    index = scene.node.store / "generations/1/index.json"
    index.parent.chmod(0o755)
    index.unlink()
    index.write_bytes(b"{")


def variable(name: str, value: str, line: str) -> Callable[[Scene], Ran]:
    """Type *line* with one more variable of the environment."""

    def type_(scene: Scene) -> Ran:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            return scene.type(f"reconcile {line}")

    return type_


def without(module: str, line: str) -> Callable[[Scene], Ran]:
    def type_(scene: Scene) -> Ran:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            return scene.type(f"reconcile {line}")

    return type_


def held_by_another(line: str) -> Callable[[Scene], Ran]:
    def type_(scene: Scene) -> Ran:
        from reconciler.store import writer_lock

        with writer_lock.hold(scene.node.store / ".lock"):
            return scene.type(f"reconcile {line}")

    return type_


def next_root(scene: Scene) -> None:
    (scene.folder / "2.root.json").write_bytes(scene.node.network.rotate())


def committed(scene: Scene) -> None:
    """Make a repository of the node's folder, whose snapshot is the committed one."""
    pointed_at("snapshot.json")(scene)
    for words in (["init", "-q"], ["add", "-A", "."], ["-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=scene.folder, check=True, capture_output=True)


def foreign(scene: Scene) -> bytes:
    """Return a snapshot of this network's name that nobody signed who may."""
    node = scene.node
    return node.network.snapshot(node.item("a:v1", tiny("a")), signers=[Key("stranger")])


def other_network(scene: Scene) -> bytes:
    node, other = scene.node, Network("othernet")
    other.root_keys, other.snapshot_keys, other.now = node.network.root_keys, node.network.snapshot_keys, node.network.now
    return other.snapshot(node.item("a:v1", tiny("a")))


def same_version(scene: Scene) -> bytes:
    node = scene.node
    return node.network.snapshot(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")), version=1)


def expired(scene: Scene) -> bytes:
    then = scene.node.network.now - timedelta(days=60)
    issued, expires = f"{then:%Y-%m-%dT%H:%M:%SZ}", f"{then + timedelta(days=30):%Y-%m-%dT%H:%M:%SZ}"
    return scene.node.network.snapshot(scene.node.item("a:v1", tiny("a")), issued_at=issued, expires_at=expires)


def early(scene: Scene) -> bytes:
    then = scene.node.network.now + timedelta(days=2)
    return scene.node.network.snapshot(scene.node.item("a:v1", tiny("a")), issued_at=f"{then:%Y-%m-%dT%H:%M:%SZ}")


def malformed(scene: Scene) -> bytes:
    return scene.node.network.sign_snapshot(b'{"schema": 1, "network": 3}')


def older_again(scene: Scene) -> None:
    old = (scene.folder / "published.json").read_bytes()
    published("a:v1", "b:v1")(scene)
    (scene.folder / "published.json").write_bytes(old)


def unsafe_root(scene: Scene) -> None:
    scene.node.network.rotate()
    (scene.folder / "3.root.json").write_bytes(scene.node.network.rotate())


def damaged_blob(scene: Scene) -> None:
    flip(scene.node.blobs()[0])


def damaged_ledger(scene: Scene) -> None:
    path = scene.node.store / "ledger.db"
    for beside in path.parent.glob("ledger.db-*"):
        beside.unlink()
    path.write_bytes(b"no database" * 1000)


def lost_entrypoint(scene: Scene) -> None:
    path = (scene.node.store / "active/models/a/v1").resolve() / "a.gguf"
    path.parent.chmod(0o755)
    path.unlink()


def failed_agent(late: bool) -> Step:
    def make(scene: Scene) -> None:
        now = datetime.now(UTC)
        health = Health(
            phase="waiting", started_at=now - timedelta(days=1), outcome="error", failures=2, message="no",
            next_at=now - timedelta(hours=1) if late else now + timedelta(minutes=3),
        )  # fmt: skip
        service.write_health(scene.node.context().layout, health)

    return make


def no_sandbox() -> tuple[ProbeResult, ...]:
    return tuple(ProbeResult(mode=mode, works=False, detail="does not work here") for mode in ("bubblewrap", "landlock"))


def refusing(*_: object, **__: object) -> Any:
    raise SandboxUnavailable("no sandbox works here")


def space(**fields: int) -> Callable[[object], os.statvfs_result]:
    real = os.statvfs("/")

    def statvfs(_: object) -> os.statvfs_result:
        names = ["f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_flag", "f_namemax"]
        return os.statvfs_result([fields.get(name, getattr(real, name)) for name in names])

    return statvfs


def on_a_server(line: str) -> Callable[[Scene], Ran]:
    """Publish the node's snapshot on a server whose clock is two hours behind, and type *line*."""

    def type_(scene: Scene) -> Ran:
        handler = functools.partial(SimpleHTTPRequestHandler, directory=str(scene.folder))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            try:
                pointed_at(f"http://127.0.0.1:{server.server_port}/published.json")(scene)
                return at(line, hours=2)(scene)
            finally:
                server.shutdown()
                thread.join()

    return type_


def a_large_model(scene: Scene) -> None:
    """Publish a model that is too large for the first request, so that aria2 downloads it."""
    scene.node.publish(scene.node.item("a:v1", tiny("a")), scene.node.item("b:v1", bytes(24 << 20)))


def unreadable(self: transfer.Transfer, _: object, now: float) -> None:
    """Hash a file whose disk gives an error."""
    self._job = None
    self._on_unreadable("Input/output error", now)


def fetched_and_silent(scene: Scene) -> None:
    """Fetch the snapshot from a server once, and stop the server."""
    with HostileServer() as server:
        server.on("/snapshot.json", honest((scene.folder / "published.json").read_bytes()))
        pointed_at(server.url("/snapshot.json"))(scene)
        assert run("sync").code == 0


def broken(*_: object, **__: object) -> Any:
    raise ValueError("a bug")


def forbidden(path: Path, *_: object, **__: object) -> Any:
    raise PermissionError(13, "Permission denied", str(path))


def newer_base(scene: Scene) -> None:
    """Make a folder of a base that has taken a newer root."""
    (scene.folder / "base").mkdir()
    for name in ("snapshot.json", "models.lock"):
        shutil.copy(scene.folder / name, scene.folder / "base")
    (scene.folder / "base/root.json").write_bytes(scene.node.network.rotate())


def two_networks(scene: Scene) -> None:
    """Collect the statuses of two nodes of two networks."""
    (scene.folder / "d").mkdir()
    for name in ("testnet", "othernet"):
        member = fleet.Member(name)
        (scene.folder / f"d/{name}.json").write_bytes(member.status(network=name, at=datetime.now(UTC)))
        fleet.enroll(scene.folder / "node-keys", member)


def spoilt_key(scene: Scene) -> None:
    next(iter(sorted((scene.folder / "node-keys").glob("*.pub")))).write_bytes(b"no key")


def refused(number: int) -> Callable[[int], None]:
    """Return a call that the system refuses with *number*."""

    def call(_: int) -> None:
        raise OSError(number, os.strerror(number))

    return call


def in_ollamas_place(scene: Scene) -> None:
    place = scene.folder / "ollama/manifests/registry.ollama.ai/library/a"
    place.mkdir(parents=True)
    for name in ("v1", "latest"):
        (place / name).write_bytes(b"of somebody else")


def answering(body: str, drain: str, line: str) -> Callable[[Scene], Ran]:
    """Type *line* where a server that answers *body* to everything is to follow the active set."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    def type_(scene: Scene) -> Ran:
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            try:
                reload = f"http://127.0.0.1:{server.server_port}/models?reload=1"
                table = f'kind = "llama-server"\nname = "main"\npath = "models.ini"\nreload = "{reload}"\ndrain = "{drain}"\n'
                scene.node.configure(f"\n[[serve]]\n{table}")
                return scene.type(f"reconcile {line}")
            finally:
                server.shutdown()
                thread.join()

    return type_


def an_empty_registry(scene: Scene) -> Ran:
    """Lock from a registry that has an image without a snapshot."""
    layer = {"mediaType": "x", "digest": f"sha256:{'0' * 64}", "size": 1, "annotations": {"org.opencontainers.image.title": "other.txt"}}
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": layer, "layers": [layer]}
    with HostileServer() as server:
        server.on("/v2/x/manifests/t", honest(json.dumps(manifest).encode()))
        host = server.url("").removeprefix("http://").rstrip("/")
        return scene.type(f"reconcile lock oci://{host}/x:t")


def empty_folder(scene: Scene) -> None:
    scene.folder = scene.folder.parent / "empty"
    scene.folder.mkdir()
    os.chdir(scene.folder)


DEAD = f"http://127.0.0.1:{closed_port()}/snapshot.json"
SANDBOX = patched("doctor --offline", (sandboxes, "probe_all", no_sandbox))

#: On a node that has locked its first snapshot.
LOCKED = [
    # -- the command line and the settings
    told("name another file", "plan --json-into reconcile.toml", then="plan --json-into plan.json"),
    told("set [swarm] enabled = true in reconcile.toml", "swarm run"),
    told(
        "run it as the user whom the folder belongs to, as deploy/systemd/reconcile-swarm.service does",
        "swarm run",
        settings('\n[swarm]\nenabled = true\nfolder = "gone/swarm"\n'),
    ),
    told("confirm with --yes", "trust init", then="trust init --yes"),
    Row(hint="`reconcile init` writes one", line="plan --config gone.toml", before=(empty_folder,)),
    Row(
        hint="`chmod go-w {}` takes that right from them",
        line="plan",
        before=(lambda scene: (scene.folder / "reconcile.toml").chmod(0o666),),
        again=0,
    ),
    Row(
        hint="; or, if you trust whoever can change these files, name the settings:",
        line="plan",
        told=True,
        before=(lambda scene: (scene.folder / "reconcile.toml").chmod(0o666),),
        then="plan --config reconcile.toml",
    ),
    told(
        "use a file that belongs to you, in folders that nobody else can change",
        "plan",
        lambda scene: os.chown(scene.folder / "reconcile.toml", 12345, 12345),
    ),
    told("edit it, or replace it with --force", "init", then="init --force"),
    told(
        "get the root from the network's operator, and name the file with --root FILE",
        "init --force --root gone.json",
        then="init --force --root root.json",
    ),
    told("ask the network's operator for it, by another way", "init --force --root https://h.example.org/root.json"),
    Row(hint="`reconcile lock --check --against {}` compares with it", line="lock --against snapshot.json"),
    Row(
        hint="`reconcile plan --node {}` plans for the node profile in that file",
        line="plan n.toml",
        before=(write("n.toml", b'memory = "8GiB"\n'),),
        codes=(0, 2),
    ),
    told("leave them out, or --node and --against", "plan --out x --against snapshot.json", then="plan --against snapshot.json"),
    told("did you mean {}?", "apply --yes --only a:v2", then="apply --yes --only a:v1"),
    Row(hint="`reconcile status` lists them", line="apply --yes --only zzzz"),
    told("there are: {}", "status zzzz", then="status a:v1"),
    told("failed: {}", "retry a:v1"),
    Row(hint="see `{} --help`", line="status --nope"),
    told("correct the key or the file that the message names", "plan", replaced("[store]", '[store]\ngrace = "24 hours"')),
    told("{} is {}", "plan", settings('\n[download]\nconnections = "many"\n')),
    told("known here: {}", "plan", replaced("[store]", "[store]\nzzzzzzzz = 1")),
    told("did you mean {}?", "plan", replaced("[store]", "[store]\ngrce = 1")),
    told("name the command that starts the server", "plan", settings('\n[runtime.vllm]\nversion = "1"\n'), then_code=0),
    Row(
        hint="it is UTF-8 text, as `reconcile init` writes it",
        line="plan",
        before=(write("reconcile.toml", b"\xff\xfe"),),
        codes=(64,),
        then="init --force",
    ),
    told("unset it; the variable of a key is RECONCILE_, its table and its name", variable("RECONCILE_NODE_" + "Q" * 60, "1", "plan")),
    told("write it as in TOML, such as {}", variable("RECONCILE_DOWNLOAD_CONNECTIONS", "many", "plan")),
    told("get root.json from the network's operator", "config check", remove("root.json")),
    told("correct the path, or let the user who runs reconcile read it", "config check", settings('\n[download]\nca_file = "gone.pem"\n')),
    told("name the URL or the file of the network's signed snapshot", "config check", remove("published.json")),
    Row(hint="make it: `mkdir -p {}`", line="config check", before=(settings('\n[agent]\npage = "pages/status.html"\n'),), again=0),
    told("install it, or correct the path", "config check", settings('\n[hooks]\nactivated = ["/not/there"]\n')),
    told("rename the folder, or put it elsewhere", variable("RECONCILE_STORE_PATH", os.fsdecode(b"st\xff"), "plan")),
    Row(hint="`reconcile doctor` checks the store, its owner and its disk", line="plan --json-into gone/x.json", codes=(0, 1)),
    told("it is a bug in reconcile, and nothing else is blamed for it", patched("status", (status_command, "status", broken))),
    Row(hint="run as the user that owns it (`ls -l`)", line=patched("plan --json-into x.json", (Path, "open", forbidden))),
    told("install the package again, or run from a checkout", patched("demo --folder d", (network, "FILES", ("gone",)))),
    # -- the lock, the envelope and the root
    Row(
        hint="`reconcile snapshot push FILE` and this address put a signed snapshot there", line=an_empty_registry, names={"FILE": "--help"}
    ),
    Row(hint="{}; the clock says {}", line=at("plan", days=-365)),
    Row(hint="run `reconcile lock` to make one", line="plan", before=(remove("models.lock"),), again=0),
    Row(hint="run `reconcile lock` to make both", line="plan", before=(remove("snapshot.json"),), again=0),
    Row(hint="run `reconcile lock` to make one", line="lock --check", before=(remove("models.lock"),), again=0),
    Row(hint="bring it back from git: `git checkout HEAD -- {}`", line="plan", before=(committed, write("snapshot.json", b"x")), again=0),
    Row(
        hint="run `reconcile lock` to get it anew, or bring it back from git", line="plan", before=(write("snapshot.json", b"x"),), again=0
    ),
    Row(
        hint="never edit the lock: run `reconcile lock` to compile it again",
        line="plan",
        again=0,
        before=(
            lambda scene: (scene.folder / "models.lock").write_text((scene.folder / "models.lock").read_text().replace("a:v1", "a:v9")),
        ),
    ),
    Row(
        hint="run `reconcile lock` to write it again; the .gitattributes that `reconcile init` writes",
        line="plan",
        codes=(0, 64),
        again=0,
        before=(
            lambda scene: (scene.folder / "models.lock").write_bytes((scene.folder / "models.lock").read_bytes().replace(b"\n", b"\r\n")),
        ),
    ),
    Row(
        hint="use that version, or run `reconcile lock` to write the lock again with this one",
        line="plan",
        again=0,
        before=(
            lambda scene: (scene.folder / "models.lock").write_text(
                (scene.folder / "models.lock").read_text().replace("schema = 1", "schema = 2")
            ),
        ),
    ),
    told("let the user who runs reconcile read it: it must be a plain file", "plan", a_folder("models.lock")),
    told("give the signed document's URL or file", "lock gone.json", then="lock published.json"),
    told("name its URL or file as [network] snapshot in the settings", "lock", remove("published.json")),
    told("look at the address and at the network; what was accepted before stays", f"lock {DEAD}"),
    told("give a file, or an address that begins with https://", "lock ftp://h.example.org/snapshot.json"),
    Row(
        hint="get root.json from the network's operator and put it there; `reconcile root inspect {}` shows its fingerprint",
        line="lock",
        before=(lambda scene: (scene.folder / "root.json").rename(scene.folder / "good.json"),),
        names={"root.json": "good.json"},
    ),
    Row(
        hint="get root.json anew from the network's operator; `reconcile root inspect FILE` shows who signed it",
        line="lock",
        before=(lambda scene: shutil.copy(scene.folder / "root.json", scene.folder / "good.json"), write("root.json", b"{}")),
        names={"FILE": "good.json"},
    ),
    Row(
        hint="the network's operator can check it with `reconcile snapshot inspect FILE`",
        line="lock",
        before=(put(malformed),),
        names={"FILE": "published.json"},
        codes=(4,),
    ),
    told("check that the address or file is the signed document itself", "lock", put(lambda _: b"{}")),
    Row(
        hint="ask the network's operator for a snapshot signed by enough of its keys; `reconcile trust show` lists them",
        line="lock",
        before=(put(foreign),),
    ),
    told("check the address of the snapshot and the pinned root: both must be of one network", "lock", put(other_network)),
    told("fetch the network's current snapshot; an older one is never accepted again", "lock", older_again),
    told("report it to the network's operator: two snapshots of one version were signed", "lock", put(same_version)),
    Row(
        hint="what is active stays active; run `reconcile lock` to fetch the network's current snapshot",
        line="lock",
        before=(put(expired),),
        codes=(4,),
    ),
    Row(hint="check this machine's clock (`timedatectl`)", line="lock", before=(put(early),)),
    Row(hint="set this machine's clock and keep it set: `timedatectl set-ntp true`", line=at("plan", days=-365)),
    Row(
        hint="get the network's newer root and run `reconcile trust update FILE`",
        line=at("plan", days=400),
        before=(next_root,),
        names={"FILE": "2.root.json"},
    ),
    Row(
        hint="get every root from the pinned one on from the network's operator, in order; `reconcile root inspect FILE` shows each",
        line="trust update 3.root.json",
        before=(unsafe_root,),
        names={"FILE": "3.root.json"},
    ),
    told("check that the address is the signed document and not another file", "lock", put(lambda _: b" " * (17 << 20))),
    Row(
        hint="check that nobody replays an old snapshot, then run `reconcile trust init` to start a new record",
        line="plan",
        codes=(64,),
        before=(lambda scene: (scene.node.store / "trust/floor.json").unlink(), lambda scene: (scene.node.store / "ledger.db").unlink()),
        then="trust init --yes",
        again=0,
    ),
    Row(
        hint="make a new one with `reconcile plan --out FILE`",
        line="apply --yes p.json",
        names={"FILE": "p.json"},
        again=0,
        before=("plan --out p.json", published("a:v1", "b:v1")),
    ),
    # -- CI
    Row(hint="fetch it first: `git fetch origin`", line="plan --against nope"),
    told("install git, or name the base as a file or folder", variable("PATH", "/nowhere", "plan --against nope")),
    Row(
        hint="`reconcile doctor --write-profile FILE` writes one on a node",
        line="plan --node d",
        before=(a_folder("d"),),
        names={"FILE": "d/n.toml"},
        codes=(0, 1),
        again=0,
    ),
    told("its keys are schema, memory, disk, reserve, id, cohorts", "plan --node n.toml", write("n.toml", b"x = 1")),
    told("bring the newer root.json back from the base", "plan --against base", newer_base),
    # -- reports and bundles
    told("name one with --network", "fleet report d", two_networks, then="fleet report d --network testnet"),
    told("copy node.pub from the node again", "fleet report d", two_networks, spoilt_key),
    told(
        "bring it back from a backup; without it, old statuses",
        "fleet report d --network testnet",
        two_networks,
        write("node-keys/seen.json", b"x"),
    ),
    Row(
        hint="`reconcile key generate node --no-passphrase`, in the folder of the settings, makes node.key and node.pub",
        line="sync",
        before=(settings('\n[node]\nid = "n"\n\n[report]\nto = "statuses"\nkey = "node.key"\n'),),
    ),
    told("name the folder that the nodes' statuses are collected in", "fleet report gone", a_folder("node-keys")),
    Row(
        hint="name it with --keys; `reconcile fleet enroll` makes it from statuses",
        line="fleet report d",
        before=(a_folder("d"),),
        names={"fleet enroll": "fleet enroll d --all"},
    ),
    Row(
        hint="run `reconcile sync`, or name with --only the models that this node has",
        line="bundle export b.tar",
        before=(published("a:v1", "b:v1"),),
        again=0,
    ),
    told("there are: {}", "bundle export b.tar --only zzzz", "apply --yes", then="bundle export b.tar --only a:v1"),
    Row(
        hint="copy it again from where it was exported, or export it anew: `reconcile bundle export`",
        line="bundle import b.tar",
        before=("apply --yes", write("b.tar", b"x" * 2048)),
        names={"bundle export": "bundle export c.tar"},
    ),
    Row(hint="`pip install gguf` installs it", line=without("gguf", "demo --folder d")),
]

#: On a node that serves one model.
SERVING = [
    # -- sync
    Row(
        hint="`{} --version` shows whether it runs at all",
        line=patched("apply --yes", (aria2_daemon, "find", lambda *_: Path("/bin/false"))),
        before=(a_large_model,),
        codes=(1,),
    ),
    Row(
        hint="check this machine's disk (`dmesg`)",
        line=patched("apply --yes", (transfer.Transfer, "_on_hashed", unreadable)),
        before=(a_large_model,),
    ),
    Row(
        hint="check [network] snapshot in the settings, DNS, the firewall and the proxy; `reconcile doctor` tests the connection",
        line="sync",
        before=(pointed_at(DEAD),),
        codes=(1,),
    ),
    Row(
        hint="what was accepted before stays in use until it expires; `reconcile doctor` tests the connection",
        codes=(1,),
        line=after("sync", days=2),
        before=(fetched_and_silent, "sync"),
    ),
    told(
        "set it for this process, or use token_file",
        "apply --yes",
        published("a:v1", "b:v1"),
        settings('\n[download.credentials."127.0.0.1"]\ntoken_env = "NO_SUCH_TOKEN"\n'),
    ),
    told(
        "add LoadCredential= to the unit, or name a file",
        "apply --yes",
        published("a:v1", "b:v1"),
        settings('\n[download.credentials."127.0.0.1"]\ntoken_file = "%d/token"\n'),
    ),
    Row(
        hint="`chmod 600 {}` takes that right from them",
        line="apply --yes",
        again=0,
        before=(
            published("a:v1", "b:v1"),
            write("token", b"secret"),
            settings('\n[download.credentials."127.0.0.1"]\ntoken_file = "token"\n'),
        ),
    ),
    # -- the store
    Row(hint="`reconcile rollback --list` shows them", line="rollback"),
    told("there are: {}", "rollback 99"),
    Row(
        hint="`reconcile rollback --list` shows the others",
        line="rollback",
        before=(
            published("a:v1", "b:v1"),
            "apply --yes",
            published("b:v1"),
            "apply --yes",
            lambda scene: shutil.rmtree(scene.node.store / "archive", ignore_errors=True),
        ),
    ),
    told("set [store] path to a folder, or move the file away", "plan", replaced("[store]", '[store]\npath = "file"'), write("file", b"x")),
    Row(hint="run `reconcile apply`: it makes a new one", line="rollback 1", before=(damaged_generation,)),
    told(
        "something else is in its place: move it away, and run again",
        "apply --yes",
        published("a:v1", "b:v1"),
        lambda scene: shutil.rmtree(scene.node.store / "staging"),
        lambda scene: (scene.node.store / "staging").write_bytes(b""),
    ),
    Row(
        hint="put the folder that was there in its place, or move the link away and run `reconcile apply`",
        line="plan",
        codes=(1,),
        before=(
            lambda scene: (scene.node.store / "blobs").rename(scene.folder / "elsewhere"),
            lambda scene: (scene.node.store / "blobs").symlink_to(scene.folder / "elsewhere"),
        ),
    ),
    Row(hint="the next `reconcile apply` keeps it as {}.damaged", line="incidents", before=(damaged_ledger,), again=0),
    told("wait for it, or pass --lock-timeout 30s", held_by_another("apply --yes"), then="apply --yes --lock-timeout 30s"),
    Row(
        hint="free {} (`reconcile gc --dry-run` shows what can go)",
        line="apply --yes",
        before=(published("a:v1", "b:v1"), replaced("1MiB", "9000TiB")),
    ),
    Row(
        hint=", or do the rest with `reconcile apply --except {}`",
        line="apply --yes",
        codes=(1, 3),
        before=(published("a:v1", "b:v1", "c:v1"), replaced("1MiB", "9000TiB")),
    ),
    Row(
        hint="`reconcile serve reload` reloads it now, and the next `reconcile apply` does too",
        line="doctor --offline",
        before=(settings('\n[[serve]]\nkind = "command"\nname = "main"\nreload = ["/bin/true"]\n'),),
    ),
    Row(
        hint="`systemctl status reconcile-swarm` says why; files come over HTTP in the meantime",
        line="doctor --offline",
        before=(settings('\n[swarm]\nenabled = true\nfolder = "gone/swarm"\n'),),
    ),
    Row(
        hint="look at the server's own log; `reconcile serve reload` tries again at once",
        line="doctor --offline",
        codes=(1,),
        before=(
            settings('\n[[serve]]\nkind = "command"\nname = "main"\nreload = ["/bin/false"]\n'),
            lambda scene: scene.type("reconcile serve reload"),
        ),
    ),
    told("the settings have no [[serve]] table", "serve reload main"),
    *(
        Row(hint=hint, line=patched("apply --yes", (os, "fsync", refused(number))), before=(published("a:v1", "b:v1"),))
        for number, hint in (
            (errno.EROFS, "the file system is mounted read-only, perhaps after an error of the disk: look at `mount` and `dmesg`"),
            (errno.EIO, "the disk may be failing: look at `dmesg` and `smartctl`"),
            (errno.EDQUOT, "this user's quota is used up, although the disk may have space: look at `quota -s`"),
            (errno.EFBIG, "the file system, or `ulimit -f`, takes no file as large"),
            (errno.EACCES, "run as the user whom the store belongs to (`ls -l`)"),
        )
    ),
    told(
        "move it away, or give the server another path in its [[serve]] table",
        "serve reload",
        settings('\n[[serve]]\nkind = "ollama"\nname = "main"\npath = "ollama"\nmodels = ["a:v1"]\n'),
        in_ollamas_place,
    ),
    Row(hint="start it with `--models-preset` and the path", line=answering('{"data": []}', "0s", "serve reload"), told=True),
    told("its reload is the address http://HOST:PORT/models?reload=1", answering("{}", "0s", "serve reload")),
    Row(hint="look at the server, or write `drain", line=answering('{"data": [{"id": "x"}]}', "5s", "serve reload"), told=True),
    told("start it as deploy/systemd/llama-server.service does", answering('{"data": []}', "0s", "doctor --offline")),
    # -- the doctor
    Row(hint="`pip install llama-cpp-python` installs it", line=patched("doctor --offline", (engines, "installed", lambda _: {}))),
    Row(
        hint="install your system's aria2 package",
        line=patched("doctor --offline", (aria2_daemon, "find", lambda *_: Path("/bin/false"))),
        told=True,
    ),
    told("install bubblewrap, and let it make user namespaces", SANDBOX),
    told("needs a kernel of 6.2 or newer with Landlock", SANDBOX),
    told("make one of the two above work; nothing is tested without", SANDBOX),
    told(
        "models of the servers stay pending",
        patched("doctor --offline", (sandboxes, "choose", refusing)),
        settings('\n[runtime.vllm]\nargv = ["/bin/true"]\n'),
    ),
    told(
        "install the NVIDIA driver; these models are skipped until then",
        patched("doctor --offline", (devices, "gpus", lambda *_, **__: ())),
        of_an_engine("llama-cpp", gpu_memory=1 << 30),
    ),
    Row(hint="look at `mount` and `dmesg`", line=patched("doctor --offline", (os, "statvfs", space(f_flag=os.ST_RDONLY)))),
    told("run as the user who owns it", patched("doctor --offline", (os, "access", lambda *_, **__: False))),
    Row(
        hint="delete files there (`df -i` counts inodes)",
        line=patched("doctor --offline", (os, "statvfs", space(f_files=100, f_favail=0, f_flag=0))),
    ),
    Row(hint="free some space: `reconcile gc --dry-run` shows what can go", line="doctor --offline", before=(replaced("1MiB", "9000TiB"),)),
    Row(
        hint="`reconcile gc --dry-run` shows what can go",
        line=patched("doctor --offline", (shutil, "disk_usage", lambda _: doctor_usage())),
    ),
    Row(hint="set the clock, and keep it so: `timedatectl set-ntp true`", line=at("doctor --offline", days=-365)),
    Row(
        hint="get the network's newer root and run `reconcile trust update FILE`",
        line=at("doctor --offline", days=360),
        before=(next_root,),
        names={"FILE": "2.root.json"},
    ),
    Row(hint="run `reconcile lock`; if the network has no newer one, tell its operator", line=at("doctor --offline", days=29)),
    told(
        "check [network] snapshot in the settings, DNS, the firewall and the proxy; what is active stays active",
        "doctor --offline",
        fetched_and_silent,
        "sync",
    ),
    told("the next sync sets it aside and begins another", "doctor --offline", damaged_ledger, then="sync"),
    Row(hint="run `reconcile verify --repair`", line="doctor --offline", before=(lost_entrypoint,)),
    told(
        "correct [hooks] activated; each run tries it again until it succeeds",
        "doctor --offline",
        settings('\n[hooks]\nactivated = ["/bin/false"]\n'),
        published("a:v1", "b:v1"),
        lambda scene: scene.type("reconcile apply --yes"),
    ),
    Row(hint="`reconcile resume` ends it", line="doctor --offline", before=(published("a:v1", "b:v1"), "apply --yes", "rollback")),
    told("is it still running? its service's log says why it ended", "doctor --offline", failed_agent(late=True)),
    told("the message says why; it tries again by itself", "doctor --offline", failed_agent(late=False)),
    told("check DNS, firewall and proxy ([download] proxy, ca_file)", "doctor", with_a_dead_source),
    told("check the address, its credentials ([download.credentials]) and the proxy", "doctor", with_a_dead_source),
    Row(hint="set the clock: `timedatectl set-ntp true`", line=on_a_server("doctor")),
    told("set [network] root_updates = ", "doctor"),
    told("correct [hooks] {} in the settings, or make the file executable", "doctor", settings('\n[hooks]\nhealthy = ["/not/there"]\n')),
    told(
        "name its server's command as argv in [runtime.{}], or install the package that brings this engine",
        "doctor --offline",
        of_an_engine("vllm"),
    ),
    told("name the server's command as argv in [runtime.openai]", "doctor --offline", of_an_engine("openai")),
    told(
        "its models stay pending until [runtime.{}] in the settings is corrected",
        "doctor --offline",
        settings('\n[runtime.vllm]\nargv = ["/not/there"]\n'),
    ),
]


def doctor_usage() -> Any:
    return shutil._ntuple_diskusage(total=1000 << 30, used=990 << 30, free=10 << 30)


@pytest.mark.parametrize("row", LOCKED, ids=lambda row: row.hint[:60])
def test_what_a_hint_tells_before_the_first_apply_works(node: Node, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    quiet_environment(monkeypatch, node.folder)
    check(row, Scene(node.folder, monkeypatch, node))


@pytest.mark.slow
@pytest.mark.parametrize("row", SERVING, ids=lambda row: row.hint[:60])
def test_what_a_hint_tells_on_a_node_that_serves_works(used: Node, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    quiet_environment(monkeypatch, used.folder)
    check(row, Scene(used.folder, monkeypatch, used))
