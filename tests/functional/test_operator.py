"""The network's operators at their terminals: every command of key, root and snapshot, as it is typed."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import click
import pytest

from reconciler.cli import run
from reconciler.commands.context import wall_clock
from reconciler.core import dsse, trust
from reconciler.core.errors import BadSignature, ReconcileError
from reconciler.demo import models
from tests import archives
from tests.network import b64

REPOSITORY = Path(__file__).parents[2]


class Terminal:
    """Types commands into a folder and keeps what came back."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.out = self.err = ""

    def __call__(self, line: str, *more: str, code: int = 0) -> str:
        """Run *line*, split at spaces, with *more* arguments; check its exit code and return what it wrote to standard output."""
        found = run([*line.split(), *more])
        self.out, self.err = self._capsys.readouterr()
        assert found == code, self.out + self.err
        return self.out

    def json(self, line: str) -> Any:
        """Run *line* with ``--json`` and return the document."""
        return json.loads(self(f"{line} --json"))

    def bytes(self, name: str) -> bytes:
        """Return what is in a file."""
        return (self.folder / name).read_bytes()


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RECONCILE_PASSPHRASE_FILE", raising=False)
    (tmp_path / "tiny.gguf").write_bytes(b"a small model")
    return Terminal(tmp_path, capsys)


@pytest.fixture
def ready(terminal: Terminal) -> Terminal:
    """Return a terminal where alice and bob hold the root, two of two, and carol and dave may sign snapshots, two of two."""
    for name in ("alice", "bob", "carol", "dave"):
        terminal(f"key generate {name} --no-passphrase")
    terminal(
        "root new root.1.json --network testnet --root-key alice.pub --root-key bob.pub --root-threshold 2"
        " --snapshot-key carol.pub --snapshot-key dave.pub --snapshot-threshold 2"
    )
    for name in ("alice", "bob"):
        terminal(f"root sign root.1.json --key {name}.key")
    terminal("snapshot new snapshot.json --network testnet")
    terminal("snapshot add snapshot.json tiny:v1 tiny.gguf --url https://models.example.org/tiny.gguf")
    return terminal


def accepted(terminal: Terminal, root: str = "root.1.json", snapshot: str = "snapshot.json") -> trust.Verified:
    """Return the snapshot as a node that pinned *root* accepts it."""
    return trust.verify(terminal.bytes(snapshot), trust.pin(terminal.bytes(root)), now=wall_clock(), trust_state=trust.TrustState())


# -- keys ------------------------------------------------------------------------------------------


def test_a_key_is_for_its_owner_alone_and_never_overwritten(terminal: Terminal) -> None:
    terminal("key generate alice --no-passphrase")
    before = terminal.bytes("alice.key")
    assert (terminal.folder / "alice.key").stat().st_mode & 0o777 == 0o600
    terminal("key generate alice --no-passphrase", code=1)
    assert "error[publish]: alice.key already exists" in terminal.err
    (terminal.folder / "alice.key").rename(terminal.folder / "moved")
    terminal("key generate alice --no-passphrase", code=1)
    assert (terminal.folder / "moved").read_bytes() == before
    assert not (terminal.folder / "alice.key").exists()


def test_a_key_is_not_written_through_a_link(terminal: Terminal) -> None:
    (terminal.folder / "alice.key").symlink_to("elsewhere")
    terminal("key generate alice --no-passphrase", code=1)
    assert not (terminal.folder / "elsewhere").exists()


def test_a_key_without_a_terminal_asks_for_nothing_and_says_what_to_give(terminal: Terminal) -> None:
    terminal("key generate alice", code=1)
    assert "hint: name a file that only you can read with --passphrase-file, or give --no-passphrase" in terminal.err
    assert not list(terminal.folder.glob("alice*"))


def test_a_passphrase_comes_from_a_file_or_the_environment(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    (terminal.folder / "word").write_text("open sesame\nsecond line\n")
    made = terminal.json("key generate alice --passphrase-file word")
    assert b"ENCRYPTED" in terminal.bytes("alice.key")
    terminal("key show alice.key", code=1)
    monkeypatch.setenv("RECONCILE_PASSPHRASE_FILE", "word")
    assert terminal.json("key show alice.key")["keyid"] == made["keyid"]
    (terminal.folder / "wrong").write_text("close sesame\n")
    terminal("key show alice.key --passphrase-file wrong", code=1)
    assert "passphrase does not open" in terminal.err
    (terminal.folder / "empty").touch()
    terminal("key generate bob --passphrase-file empty", code=1)
    assert "the passphrase is empty" in terminal.err


def test_a_lost_public_half_is_made_again(terminal: Terminal) -> None:
    terminal("key generate alice --no-passphrase")
    assert terminal("key show alice.key").encode() == terminal.bytes("alice.pub") == terminal("key show alice.pub").encode()


def test_a_private_key_that_others_can_read_is_noted(ready: Terminal) -> None:
    (ready.folder / "carol.key").chmod(0o644)
    ready("snapshot sign snapshot.json --key carol.key")
    assert "note: carol.key has no passphrase and others on this machine may read it" in ready.err


# -- roots -----------------------------------------------------------------------------------------


def test_two_people_sign_a_root_in_turn_and_a_third_may_not(ready: Terminal) -> None:
    report = ready.json("root inspect root.1.json")
    assert report["complete"] is True
    assert trust.pin(ready.bytes("root.1.json"), report["fingerprint"]).version == 1
    before = ready.bytes("root.1.json")
    ready("root sign root.1.json --key carol.key", code=1)
    assert ready.bytes("root.1.json") == before
    ready("root inspect root.1.json")
    assert "root: 2 of 2 keys must sign" in ready.out
    assert "complete: nodes will accept it" in ready.out


def test_a_signed_root_is_not_edited_in_place_nor_another_overwritten(ready: Terminal) -> None:
    before = ready.bytes("root.1.json")
    ready("root set root.1.json --expires 30d", code=1)
    assert "--out 2.root.json" in ready.err
    ready("root set root.1.json --expires 30d --out root.1.json", code=1)
    assert ready.bytes("root.1.json") == before
    ready("root new root.1.json --network x --root-key alice.pub --snapshot-key alice.pub", code=1)
    assert ready.bytes("root.1.json") == before


def test_a_key_is_rotated_and_nodes_follow(ready: Terminal) -> None:
    ready("key generate erin --no-passphrase")
    ready("root add-key root.1.json erin.pub --role root --out root.2.json")
    ready("root remove-key root.2.json alice.pub --role root")
    ready("root sign root.2.json --key alice.key", code=1)
    for name in ("alice", "bob", "erin"):
        ready(f"root sign root.2.json --key {name}.key --previous root.1.json")
    assert "complete: nodes will accept it" in ready.out
    ready("root inspect root.2.json --previous root.1.json")
    assert "a key of the previous root" in ready.out
    assert trust.advance(trust.pin(ready.bytes("root.1.json")), ready.bytes("root.2.json")).version == 2


def test_labels_are_shown_wherever_a_key_is(ready: Terminal) -> None:
    ready("root add-key root.1.json alice.pub --role snapshot --out root.2.json --label", "release key, 2026")
    ready("root label root.2.json carol.pub", "CI, 2026")
    for line in ("--key alice.key", "--key bob.key --previous root.1.json"):
        ready(f"root sign root.2.json {line}")
        assert "signed by " in ready.out
        assert '"release key, 2026"' in ready.out
    alice = ready.json("key show alice.pub")["keyid"]
    assert f'{alice} "release key, 2026"  signed' in ready("root inspect root.2.json")
    assert ready.json("root inspect root.2.json")["labels"][alice] == "release key, 2026"
    assert ready.json("root inspect root.2.json")["signatures"][0]["label"] == "release key, 2026"
    for name in ("alice", "carol"):
        ready(f"snapshot sign snapshot.json --key {name}.key --root root.2.json")
    assert '"CI, 2026"' in ready.out
    assert f'signed by {alice} "release key, 2026" (valid)' in ready("snapshot inspect snapshot.json --root root.2.json")
    assert {one["label"] for one in ready.json("snapshot inspect snapshot.json --root root.2.json")["signatures"]} == {
        "release key, 2026",
        "CI, 2026",
    }
    ready("snapshot sign snapshot.json --key bob.key --root root.2.json", code=1)
    ready("init --root root.2.json --snapshot snapshot.json")
    ready("lock")
    assert f'{alice} "release key, 2026"' in ready("trust show")
    assert ready.json("trust show")["labels"][alice] == "release key, 2026"
    run(["doctor", "--offline"])
    assert f'{alice[:16]}… "release key, 2026"' in ready._capsys.readouterr().out.replace("\n", " ")


def test_a_label_of_a_new_root_is_given_with_its_keys(ready: Terminal) -> None:
    line = "root new draft.json --network testnet --root-key alice.pub --snapshot-key carol.pub --label"
    ready(line, "carol.pub=CI, 2026")
    assert [*ready.json("root inspect draft.json")["labels"].values()] == ["CI, 2026"]
    for wrong, why in (("CI, 2026", "KEY.pub=TEXT"), ("dave.pub=Dave", "no keys of this root")):
        ready(line.replace("draft", "other"), wrong, code=1)
        assert why in ready.err


def test_an_unsigned_root_is_edited_in_place(ready: Terminal) -> None:
    ready("root new draft.json --network testnet --root-key alice.pub --snapshot-key carol.pub")
    ready("root add-key draft.json dave.pub --role snapshot")
    ready("root set draft.json --snapshot-threshold 2")
    keyid = ready.json("key show dave.pub")["keyid"]
    ready(f"root remove-key draft.json {keyid[:8]}", code=1)
    ready("root set draft.json --snapshot-threshold 1 --root-threshold 1 --expires 2099-01-01")
    ready(f"root remove-key draft.json {keyid[:8]}")
    report = ready.json("root inspect draft.json")
    assert (report["version"], report["expires_at"], len(report["roles"]["snapshot"]["keyids"])) == (1, "2099-01-01T00:00:00Z", 1)


def test_openssl_signs_a_root(ready: Terminal) -> None:
    ready("root new draft.json --network testnet --root-key alice.pub --snapshot-key carol.pub")
    ready("root pae draft.json --out to-sign")
    openssl(ready.folder, "pkeyutl", "-sign", "-rawin", "-inkey", "alice.key", "-in", "to-sign", "-out", "sig")
    ready("root attach draft.json --key bob.pub --signature sig", code=1)
    ready("root attach draft.json --key alice.pub --signature sig")
    assert trust.pin(ready.bytes("draft.json")).network == "testnet"


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=30)


# -- snapshots -------------------------------------------------------------------------------------


def test_two_people_sign_a_snapshot_in_turn_and_nodes_take_it_then(ready: Terminal) -> None:
    ready("snapshot sign snapshot.json --key carol.key --root root.1.json")
    assert "incomplete: it needs 1 more signature" in ready.out
    with pytest.raises(BadSignature):
        accepted(ready)
    ready("snapshot sign snapshot.json --key dave.key --root root.1.json")
    assert "complete: nodes will accept it" in ready.out
    (found,) = accepted(ready).snapshot.models
    digest = f"sha256:{hashlib.sha256(b'a small model').hexdigest()}"
    assert (found.id, found.artifacts[0].digest, found.artifacts[0].size) == ("tiny:v1", digest, 13)
    assert (found.entrypoint, found.artifacts[0].urls) == ("tiny.gguf", ("https://models.example.org/tiny.gguf",))


def test_openssl_signs_a_snapshot(ready: Terminal) -> None:
    ready("snapshot pae snapshot.json --out to-sign")
    for name in ("carol", "dave"):
        openssl(ready.folder, "pkeyutl", "-sign", "-rawin", "-inkey", f"{name}.key", "-in", "to-sign", "-out", "sig")
        ready(f"snapshot attach snapshot.json --key {name}.pub --signature sig --root root.1.json")
    assert accepted(ready).snapshot.version == 1


def test_the_bytes_to_sign_go_through_a_pipe_as_they_are(ready: Terminal) -> None:
    ready("snapshot pae snapshot.json --out to-sign")
    command = [sys.executable, str(REPOSITORY / "cli.py"), "snapshot", "pae", "snapshot.json"]
    piped = subprocess.run(command, cwd=ready.folder, check=True, capture_output=True, timeout=60)
    assert piped.stdout == ready.bytes("to-sign")
    assert piped.stdout.startswith(b"DSSEv1 43 application/vnd.reconciler.snapshot.v1+json ")


def test_an_edit_of_a_signed_snapshot_says_that_its_signatures_are_gone(ready: Terminal) -> None:
    ready("snapshot sign snapshot.json --key carol.key")
    ready("snapshot set-state snapshot.json tiny:v1 disabled")
    assert "note: 1 signature no longer valid and removed" in ready.err
    assert "snapshot 2, unsigned" in ready.out


def test_what_is_refused_leaves_the_file_as_it_was(ready: Terminal) -> None:
    before = ready.bytes("snapshot.json")
    for line in (
        "snapshot add snapshot.json tiny:v1 tiny.gguf",
        "snapshot add snapshot.json tiny tiny.gguf",
        "snapshot add snapshot.json ../x:v1 tiny.gguf",
        "snapshot add snapshot.json tiny:v2 missing.gguf",
        "snapshot add snapshot.json tiny:v2 tiny.gguf --url ftp://models.example.org/x",
        "snapshot add snapshot.json tiny:v2 tiny.gguf --path ../../x",
        "snapshot add snapshot.json tiny:v2 tiny.gguf --engine-version nonsense",
        "snapshot add snapshot.json tiny:v2 tiny.gguf --expect-regex (",
        "snapshot add snapshot.json tiny:v2 tiny.gguf --timeout soon",
        "snapshot add snapshot.json tiny:v2 tiny.gguf --max-size 3",
        "snapshot add snapshot.json tiny:v2 tiny.gguf --unpack tar",
        "snapshot add snapshot.json tiny:v2 tiny.gguf http://models.example.org/plain-http",
        "snapshot remove snapshot.json other:v1",
        "snapshot set-state snapshot.json other:v1 archived",
        "snapshot set snapshot.json --retest-after never",
        "snapshot sign snapshot.json --key alice.key --root root.1.json",
        "snapshot sign snapshot.json --key carol.pub",
        "snapshot new snapshot.json --network testnet",
    ):
        ready(line, code=1)
        assert ready.bytes("snapshot.json") == before, line
        assert ready.err.startswith("error["), line
    assert not [path for path in ready.folder.iterdir() if path.name.startswith(".")], "no temporary file stays"


def test_a_model_of_several_files_and_every_option(ready: Terminal) -> None:
    (ready.folder / "m-00001-of-00002.gguf").write_bytes(b"one")
    (ready.folder / "m-00002-of-00002.gguf").write_bytes(b"two")
    ready(
        "snapshot add snapshot.json big:v1 m-00002-of-00002.gguf m-00001-of-00002.gguf --url https://h.example.org/{path} --task chat"
        " --task completion --engine llama-cpp --engine-version >=0.3,<0.5 --gpu-memory 6GiB --memory 8GiB --state disabled"
        " --smoke-task completion --max-tokens 4 --expect-regex Paris --expect-tokens 2 --timeout 60s --prompt",
        "The capital of France is",
    )
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key")
    model = accepted(ready).snapshot.models[1]
    assert model.entrypoint == "m-00001-of-00002.gguf"
    assert [one.urls for one in model.artifacts] == [(f"https://h.example.org/{one.path}",) for one in model.artifacts]
    assert (model.gpu_memory, model.memory, model.state, model.tasks) == (6 << 30, 8 << 30, "disabled", ("chat", "completion"))
    assert (model.smoke.prompt, model.smoke.expect.regex, model.smoke.expect.min_tokens) == ("The capital of France is", "Paris", 2)


def test_inspect_and_diff_read_well_and_as_json(ready: Terminal) -> None:
    (ready.folder / "before.json").write_bytes(ready.bytes("snapshot.json"))
    ready("snapshot sign snapshot.json --key carol.key")
    ready("snapshot inspect snapshot.json --root root.1.json")
    assert "tiny:v1" in ready.out
    assert "(valid)" in ready.out
    ready("snapshot set-state snapshot.json tiny:v1 archived")
    ready("snapshot diff before.json snapshot.json")
    assert '~ tiny:v1 state: "enabled" -> "archived"' in ready.out
    assert ready.json("snapshot diff before.json snapshot.json")["changed"][0]["after"] == "archived"
    assert ready.json("snapshot inspect snapshot.json")["models"][0]["id"] == "tiny:v1"
    ready("snapshot diff before.json before.json")
    assert "no differences" in ready.out
    ready("snapshot inspect root.1.json", code=4)
    assert "this is a trust root: `reconcile root inspect FILE` shows it" in ready.err


def test_what_strangers_wrote_into_a_document_reaches_no_terminal(ready: Terminal) -> None:
    outer = json.loads(ready.bytes("snapshot.json"))
    payload = dsse.decode_base64(outer["payload"])[:-1] + b',"\\u001b[2J\\u202e":"\\u001b]0;x\\u0007"}'
    hostile = outer | {"payload": b64(payload), "signatures": [{"keyid": "\x1b[31m", "sig": "AAAA"}]}
    (ready.folder / "hostile.json").write_text(json.dumps(hostile))
    ready("snapshot inspect hostile.json")
    assert ready.out.replace("\n", "").isprintable()
    ready("snapshot diff snapshot.json hostile.json")
    assert ready.out.replace("\n", "").isprintable()
    ready("snapshot set-state hostile.json tiny:v1 archived")
    assert (ready.out + ready.err).replace("\n", "").isprintable()


def test_a_snapshot_is_issued_anew_before_it_expires(ready: Terminal) -> None:
    ready("snapshot set snapshot.json --expires 90d --fallback https://mirror.example.org/{algorithm}/{hex} --retest-after 7d")
    report = ready.json("snapshot inspect snapshot.json")
    assert report["fallback"] == ["https://mirror.example.org/{algorithm}/{hex}"]
    assert report["retest_after"] == "7d"
    assert report["expires_at"] > report["issued_at"]


def test_a_time_that_is_past_or_none_is_a_wrong_usage(ready: Terminal) -> None:
    for end in ("soon", "2020-01-01", "-3d", "2026-13-01", "99999999999d"):
        ready("snapshot set snapshot.json --expires", end, code=64)


def test_a_model_without_an_address_is_noted(ready: Terminal) -> None:
    ready("snapshot add snapshot.json tiny:v2 tiny.gguf")
    assert "note: no --url is given" in ready.err


def gguf_of(path: Path, kind: Literal["chat", "embedding"]) -> bytes:
    """Return a tiny real model, written to *path*."""
    models.write(models.Shape(seed="seed", kind=kind, width=64), path)
    return path.read_bytes()


def test_what_a_gguf_header_tells_is_filled_in_and_said_to_be_an_estimate(ready: Terminal) -> None:
    data = gguf_of(ready.folder / "chat.gguf", "chat")
    ready("snapshot add snapshot.json chat:v1 chat.gguf --url https://models.example.org/chat.gguf")
    assert "GGUF header: llama, " in ready.out
    assert "note: the GPU memory is an estimate" in ready.err
    added = next(one for one in ready.json("snapshot inspect snapshot.json")["models"] if one["id"] == "chat:v1")
    assert added["tasks"] == ["chat", "completion"]
    assert added["gpu_memory"] > len(data) / 2
    with serving(sends(data)) as url:
        ready(f"snapshot add snapshot.json chat:v2 {url}/chat.gguf --gpu-memory 0 --task chat")
    assert "an estimate" not in ready.err
    assert "no GPU memory" in ready.out


def test_an_embedding_model_is_tested_for_its_dimension(ready: Terminal) -> None:
    gguf_of(ready.folder / "e.gguf", "embedding")
    ready("snapshot add snapshot.json e:v1 e.gguf --url https://models.example.org/e.gguf")
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key")
    added = accepted(ready).snapshot.models[1]
    assert added.tasks == ("embedding",)
    assert added.smoke.expect.dimension == 64
    assert added.smoke.expect.min_tokens == 0


def test_a_malformed_gguf_is_added_with_a_warning(ready: Terminal) -> None:
    (ready.folder / "cut.gguf").write_bytes(gguf_of(ready.folder / "whole.gguf", "chat")[:2000])
    for name in ("tiny.gguf", "cut.gguf"):
        ready(f"snapshot add snapshot.json {name[:4]}:v9 {name} --url https://models.example.org/{name}")
        assert "note: an engine may refuse this" in ready.err


# -- a model in an archive -------------------------------------------------------------------------


def test_an_archive_that_nodes_take_is_added_and_its_model_is_found_in_it(ready: Terminal) -> None:
    (ready.folder / "good.tar").write_bytes(archives.tar(archives.member(b"m/a.gguf", b"model"), archives.member(b"m/LICENSE", b"text")))
    ready("snapshot add snapshot.json packed:v1 good.tar --unpack tar --url https://models.example.org/good.tar")
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key")
    assert accepted(ready).snapshot.models[1].entrypoint == "m/a.gguf"


@pytest.mark.parametrize(
    ("name", "packed", "why"),
    [
        ("a.tar", archives.tar(archives.pax({"GNU.sparse.major": "1"}), archives.member(b"m", b"x")), "carries 'GNU.sparse.major'"),
        ("a.tar", archives.tar(archives.member(b"././@LongLink", b"m" * 300, kind=b"L"), archives.member(b"m", b"x")), "GNU long name"),
        ("a.tar", archives.tar(archives.member(b"l", kind=b"2", link=b"../m"), archives.member(b"m", b"x")), "leads out of the archive"),
        ("a.tar", archives.tar(archives.member(b"../m", b"x")), "'../m'"),
        ("a.tar", archives.tar(archives.member(b"m", b"x"))[:700], "cut short"),
        ("a.tar.gz", archives.tar(archives.member(b"m", b"x")), "stream cannot be read"),
        ("a.zip", b"no archive", ""),
    ],
    ids=["pax", "long-name", "link", "parent", "cut", "not-packed", "no-zip"],
)
def test_an_archive_that_nodes_would_refuse_is_not_added(ready: Terminal, name: str, packed: bytes, why: str) -> None:
    """By the very check that nodes make: it must not pass here and fail on a thousand of them."""
    before = ready.bytes("snapshot.json")
    (ready.folder / name).write_bytes(packed)
    ready(f"snapshot add snapshot.json packed:v1 {name} --entrypoint m --unpack {name[2:]}", code=1)
    assert f"error[unpack-refused]: every node would refuse {name}: " in ready.err
    assert why in ready.err
    assert "hint: " in ready.err
    assert "pack" in ready.err.partition("hint: ")[2]
    assert ready.bytes("snapshot.json") == before


def test_what_an_archive_lacks_is_no_entrypoint(ready: Terminal) -> None:
    (ready.folder / "a.tar").write_bytes(archives.tar(archives.member(b"m/a.gguf", b"model")))
    ready("snapshot add snapshot.json packed:v1 a.tar --unpack tar --entrypoint a.gguf", code=1)
    assert "no archive contains the entrypoint 'a.gguf'" in ready.err
    assert "hint: they contain: m/a.gguf" in ready.err
    (ready.folder / "b.tar").write_bytes(ready.bytes("a.tar") + bytes(512))
    ready("snapshot add snapshot.json packed:v1 a.tar b.tar --unpack tar", code=1)
    assert "two of them contain 'm/a.gguf'" in ready.err


def test_an_archive_at_an_address_is_said_not_to_have_been_looked_at(ready: Terminal) -> None:
    with serving(sends(archives.tar(archives.member(b"m", b"x")))) as url:
        ready(f"snapshot add snapshot.json packed:v1 {url}/a.tar --unpack tar --entrypoint m")
    assert "note: an archive at a URL is not checked" in ready.err


# -- a model at a URL ------------------------------------------------------------------------------

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def sends(data: bytes, *, status: int = 200, length: int | None = None, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        if length != -1:
            handler.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        with contextlib.suppress(OSError):
            handler.wfile.write(data)

    return answer


def test_a_url_is_measured_and_is_where_nodes_fetch_it(ready: Terminal) -> None:
    data = bytes(range(256)) * 5000
    with serving(sends(data)) as url:
        ready(f"snapshot add snapshot.json remote:v1 {url}/models/remote%20one.gguf?version=2 --url https://mirror.example.org/x")
    assert "note: a URL has a query" in ready.err
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key")
    (artifact,) = accepted(ready).snapshot.models[1].artifacts
    assert (artifact.digest, artifact.size) == (f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))
    assert artifact.path == "remote one.gguf"
    assert artifact.urls == (f"{url}/models/remote%20one.gguf?version=2", "https://mirror.example.org/x")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (sends(b"half", length=8), "ended after 4 of 8 bytes"),
        (sends(b"data", length=-1), "does not state its length"),
        (sends(b"data", Content_Encoding="gzip"), "compressed"),
        (sends(b"gone", status=404), "answered 404"),
        (sends(b"", status=302, Location="http://models.example.org/x"), "plain http is refused"),
        (sends(b"", status=302, Location="file:///etc/passwd"), "file"),
        (sends(b"", status=302, Location="/again"), "redirect"),
        (sends(b"0" * 2000), "more than 1,024 bytes"),
        (sends(b""), "empty"),
    ],
    ids=["cut", "unsized", "compressed", "missing", "plain-http", "file", "loop", "endless", "empty"],
)
def test_a_server_that_lies_or_fails_is_refused_and_nothing_is_added(ready: Terminal, answer: Answer, why: str) -> None:
    before = ready.bytes("snapshot.json")
    with serving(answer) as url:
        assert run(["snapshot", "add", "snapshot.json", "remote:v1", f"{url}/x.gguf", "--max-size", "1KiB"]) in {1, 4}
    ready("key show alice.pub")
    assert why in ready.err
    assert ready.bytes("snapshot.json") == before


def test_a_document_that_drips_in_is_given_up(tmp_path: Path) -> None:
    """Slow retrieval: one byte in each timeout would hold a node's lock for ever."""
    del tmp_path
    done = threading.Event()

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not done.wait(0.02):
                handler.wfile.write(b"x")

    from reconciler.fetch import http

    with serving(drip) as url:
        try:
            with pytest.raises(ReconcileError, match="and is not done"):
                http.get(f"{url}/snapshot.json", max_bytes=10**9, timeout_seconds=0.3)
        finally:
            done.set()


def test_every_command_of_the_operator_says_what_it_does_with_an_example() -> None:
    from reconciler.cli.operator import key, root, snapshot

    groups = [key, root, snapshot]
    while groups:
        group = groups.pop()
        assert group.help
        for name, command in group.commands.items():
            assert command.help, name
            if isinstance(command, click.Group):
                groups.append(command)
            else:
                assert "\b" in command.help or name == "pae", f"{group.name} {name} has no example"


def test_a_pointer_to_a_model_is_not_published_for_it(ready: Terminal) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'46' * 32}\nsize 4368438944\n"
    (ready.folder / "model.gguf").write_text(pointer)
    before = ready.bytes("snapshot.json")

    ready("snapshot add snapshot.json m:v1 model.gguf", code=1)

    assert f"model.gguf is a git LFS pointer to sha256:{'46' * 32}, 4,368,438,944 bytes (4.1 GiB)" in ready.err
    assert "git lfs pull" in ready.err
    assert ready.bytes("snapshot.json") == before


def test_a_model_of_another_format_is_noted_with_what_it_is(ready: Terminal) -> None:
    (ready.folder / "model.gguf").write_bytes((64).to_bytes(8, "little") + b"{" + b" " * 63 + bytes(64))

    ready("snapshot add snapshot.json m:v1 model.gguf --url https://models.example.org/model.gguf")

    assert "note: an engine may refuse this file: model.gguf is a safetensors file; convert it to GGUF" in ready.err
