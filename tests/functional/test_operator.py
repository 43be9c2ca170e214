"""The network's operators at their terminals: every command of key, root and snapshot, as it is typed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from reconciler.cli import run
from reconciler.commands.context import wall_clock
from reconciler.core import dsse, trust
from reconciler.core.errors import BadSignature
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
