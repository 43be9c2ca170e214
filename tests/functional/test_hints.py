"""What a person reads who did something wrong: what it is, and the way out; and what a program reads, that it failed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

import pytest
from msgspec.structs import replace

from reconciler import cli
from reconciler.agent import service
from reconciler.commands import apply as engine
from reconciler.commands.status import Health
from reconciler.core.errors import NotYetValid
from reconciler.store import trust_state
from reconciler.store.ledger import Ledger
from tests.network import Network
from tests.node import Node, run, tiny


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with no settings above it, to work in."""
    monkeypatch.delenv("RECONCILE_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- an output that takes nothing ------------------------------------------------------------------


def full() -> IO[str]:
    """Return a stream to a full disk."""
    return Path("/dev/full").open("w")


def unread() -> IO[str]:
    """Return a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def said_to(stream: IO[str], *arguments: str) -> tuple[int, str]:
    """Run one command line with *stream* as its standard output; return its exit code and what it said on standard error."""
    err = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(err):
        code = cli.run(list(arguments))
        said = "" if err.closed else err.getvalue()
    with contextlib.suppress(OSError):
        stream.close()
    return code, said


SHOWN = [
    ["plan"], ["status"], ["lock"], ["lock", "--check"], ["apply", "--yes"], ["sync"], ["verify"], ["gc", "--dry-run"], ["history"],
    ["incidents"], ["doctor", "--offline"], ["trust", "show"],
]  # fmt: skip


@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["text", "json"])
def test_a_full_output_is_no_success(used: Node, json_: list[str]) -> None:
    for command in SHOWN:
        code, said = said_to(full(), *command, *json_, "--config", str(used.folder / "reconcile.toml"))
        assert code == 1, command
        assert "error[store]: standard output: No space left on device" in said


def test_a_full_output_of_the_operators_commands_is_no_success(alone: Path) -> None:
    assert run("snapshot", "new", "s.json", "--network", "testnet").code == 0
    for command in (["snapshot", "inspect", "s.json"], ["snapshot", "inspect", "s.json", "--json"], ["--help"], ["--version"]):
        code, said = said_to(full(), *command)
        assert code == 1, command
        assert "error[store]: standard output: No space left on device" in said
    del alone


def test_an_error_that_standard_output_does_not_take_is_said_on_standard_error(used: Node) -> None:
    (used.folder / "models.lock").write_text("edited")
    code, said = said_to(full(), "plan", "--json", "--config", str(used.folder / "reconcile.toml"))

    assert code == 4
    assert said.startswith("error[lock-mismatch]: ")


@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["text", "json"])
def test_a_reader_that_went_away_ends_no_run_and_is_told_as_a_pipe_is(node: Node, json_: list[str]) -> None:
    node.publish(node.item("a:v1", tiny("a")))

    code, _ = said_to(unread(), "apply", "--yes", *json_, "--config", str(node.folder / "reconcile.toml"))

    assert code == 141
    assert node.states() == {"a:v1": "active"}


def test_json_into_a_full_file_is_no_success(used: Node) -> None:
    for command in ("plan", "apply"):
        ran = used.run(command, "--json-into", "/dev/full")
        assert ran.code == 1, ran
        assert "/dev/full: No space left on device" in ran.err


# -- a failure that a program reads from a file ----------------------------------------------------


def test_json_into_a_file_tells_of_the_error_too(used: Node, tmp_path: Path) -> None:
    (used.folder / "published.json").write_text("{}")
    (used.folder / "models.lock").write_text("edited")
    into = tmp_path / "said.json"
    for command in (["plan"], ["apply", "--yes"], ["sync"], ["status"], ["verify"]):
        into.write_text("of an earlier run\n")

        ran = used.run(*command, "--json-into", str(into))

        assert ran.code == 4
        last = json.loads(into.read_text().splitlines()[-1])
        assert last["error"]["name"] == ran.err.partition("[")[2].partition("]")[0]
        assert set(last["error"]) == {"name", "message", "hint"}
        assert "of an earlier run" not in into.read_text()


def test_json_into_a_folder_that_is_not_there_says_so(used: Node, tmp_path: Path) -> None:
    ran = used.run("plan", "--json-into", str(tmp_path / "gone/said.json"))
    assert ran.code == 1
    assert "gone/said.json: No such file or directory" in ran.err


# -- no command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["trust"], ["key"], ["root"], ["snapshot"]], ids=" ".join)
def test_a_command_that_is_missing_is_answered_with_help(command: list[str]) -> None:
    ran = run(*command)

    assert ran.code == 64
    assert ran.err == run(*command, "--help").out
    assert ran.out == ""


# -- the lock, the root and the settings -----------------------------------------------------------


def test_before_init_every_command_names_it(alone: Path) -> None:
    for command in ("plan", "apply", "status", "gc"):
        ran = run(command)
        assert ran.code == 4
        assert f"there is no lock yet: {alone}/models.lock" in ran.err
        assert (
            "hint: run `reconcile lock` to make one; there is no reconcile.toml in this folder or a parent: `reconcile init` writes one"
            in ran.err
        )


def test_after_a_bare_init_lock_says_where_the_root_goes(alone: Path) -> None:
    assert run("init").code == 0
    ran = run("lock")
    assert ran.code == 1
    assert f"there is no trust root yet: {alone}/root.json" in ran.err
    assert "hint: get root.json from the network's operator and put it there" in ran.err
    assert "init" not in ran.err.partition("hint:")[2]  # it would refuse: the settings are there


def test_a_lock_that_may_not_be_read_is_not_said_to_be_missing(used: Node) -> None:
    (used.folder / "models.lock").unlink()
    (used.folder / "models.lock").mkdir()
    ran = used.run("plan")
    assert ran.code == 4
    assert f"{used.folder}/models.lock cannot be read: Is a directory" in ran.err
    assert "there is no lock" not in ran.err


@pytest.mark.parametrize("command", [["lock"], ["lock", "--check"], ["trust", "update"]], ids=" ".join)
def test_an_address_of_an_unknown_kind_is_no_path(used: Node, command: list[str]) -> None:
    ran = run(*command, "--config", str(used.folder / "reconcile.toml"), "ftp://h.example.org/snapshot.json")
    assert ran.code == 64
    assert "nothing is fetched from ftp://" in ran.err
    assert "hint: give a file, or an address that begins with https://" in ran.err


def test_init_refuses_an_address_that_lock_would(alone: Path) -> None:
    ran = run("init", "--snapshot", "ftp://h.example.org/snapshot.json")
    assert ran.code == 64
    assert not (alone / "reconcile.toml").exists()


def test_an_empty_folder_of_an_operator_says_how_to_begin(alone: Path) -> None:
    (alone / "a.gguf").write_bytes(b"a")
    ran = run("snapshot", "add", "snapshot.json", "a:v1", "a.gguf")
    assert ran.code == 1
    assert "hint: `reconcile snapshot new snapshot.json --network NAME` makes one" in ran.err
    ran = run("root", "sign", "root.json", "--key", "alice.key")
    assert "hint: `reconcile root new root.json` makes one" in ran.err
    assert run("snapshot", "new", "snapshot.json", "--network", "testnet").code == 0
    ran = run("snapshot", "add", "snapshot.json", "a:v1", "ftp://h.example.org/a.gguf")
    assert ran.code == 64
    assert "hint: give a file, or an address that begins with https://" in ran.err


def test_a_document_that_does_not_hold_is_named(used: Node) -> None:
    """There are three of them, and one is the node's own."""
    spoilt = {"published.json": ["lock", "sync"], "snapshot.json": ["plan", "status"], "root.json": ["plan", "lock", "trust show"]}
    for name, commands in spoilt.items():
        good = (used.folder / name).read_bytes()
        for bad in (b"x", b"{}", b'{"payloadType": "x", "payload": "", "signatures": []}'):
            (used.folder / name).write_bytes(bad)
            for command in commands:
                ran = run(*command.split(), "--config", str(used.folder / "reconcile.toml"))
                assert ran.code == 4, (name, command, ran)
                assert f"]: {used.folder / name}: " in ran.err
        (used.folder / name).write_bytes(good)


def test_a_network_that_does_not_answer_lock_is_an_error_to_programs_too(used: Node) -> None:
    ran = used.run("lock", "http://127.0.0.1:9/snapshot.json", "--json")
    assert ran.code == 1
    assert ran.json["error"]["name"] == "source-failed"
    assert "what was accepted before stays" in ran.err
    assert used.run("plan").code == 0


def test_what_has_to_be_done_is_not_said_to_be_up_to_date(used: Node) -> None:
    (used.store / "active").unlink()
    os.utime(next(path for path in (used.store / "blobs").rglob("*") if path.is_file()), (0, 0))
    said = used.run("status", "--json").json["models"][0]
    assert said["state"] == "pending"
    assert not said["reason"].startswith("up-to-date")


def test_an_operator_reads_words_and_no_patterns(alone: Path) -> None:
    (alone / "a.gguf").write_bytes(b"a")
    assert run("key", "generate", "k", "--no-passphrase").code == 0
    ran = run("root", "new", "r.json", "--network", "My Net", "--root-key", "k.pub", "--snapshot-key", "k.pub")
    assert "expected lowercase letters, digits and . _ -, at most 128, a letter or digit first - at `network`" in ran.err
    assert run("snapshot", "new", "s.json", "--network", "net").code == 0
    for wrong, field in (("Tiny:v1", "name"), ("tiny:v 1", "version")):
        ran = run("snapshot", "add", "s.json", wrong, "a.gguf")
        assert "regex" not in ran.err
        assert f"a letter or digit first - at `models[0].{field}`" in ran.err


def test_what_is_wrong_with_a_file_of_an_operator_names_it(alone: Path) -> None:
    assert run("snapshot", "new", "s.json", "--network", "net").code == 0
    assert run("key", "generate", "k", "--no-passphrase").code == 0
    assert "error[publish]: k.pub: not a private key" in run("snapshot", "sign", "s.json", "--key", "k.pub").err
    (alone / "x").write_text("x")
    assert "hint: `reconcile snapshot new` makes such a file" in run("snapshot", "inspect", "x").err
    assert "hint: `reconcile root new` makes such a file" in run("root", "inspect", "x").err
    ran = run("snapshot", "add", "s.json", "x:v1", "x", "--url", "http://h.example.org/x")
    assert "note: nodes refuse plain http to another machine" in ran.err


def test_init_says_what_is_still_missing(alone: Path) -> None:
    said = run("init").out
    assert "put the network's root beside it as root.json; name the network's snapshot in it, by its URL or file; reconcile lock" in said
    (alone / "root.json").write_bytes(Network().root(signers=()))
    ran = run("init", "--force", "--root", "root.json", "--snapshot", "https://h.example.org/snapshot.json")
    assert ran.code == 4
    assert "hint: get root.json anew from the network's operator" in ran.err
    (alone / "root.json").write_bytes(Network().root())
    ran = run("init", "--force", "--root", "root.json", "--snapshot", "https://h.example.org/snapshot.json")
    assert ran.out.endswith("Next: reconcile lock\n")


# -- a clock that was ahead ------------------------------------------------------------------------


def test_a_clock_that_was_ahead_for_one_run_locks_nobody_out(used: Node) -> None:
    ahead = datetime.now(UTC) + timedelta(days=20)
    engine.sync(used.context(lambda: ahead), lambda _: None)

    for command in (["plan"], ["apply", "--yes"], ["sync"], ["lock"]):
        assert used.run(*command).code == 0
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0
    assert used.states() == {"a:v1": "active", "b:v1": "active"}


def test_a_clock_that_is_behind_is_named_with_what_to_do(used: Node) -> None:
    behind = datetime.fromtimestamp(0, UTC)
    with pytest.raises(NotYetValid) as refused:
        engine.sync(used.context(lambda: behind), lambda _: None)
    assert "the clock says 1970-01-01T00:00:00Z" in refused.value.hint
    assert "the clock is behind" in refused.value.message
    assert "timedatectl" in refused.value.hint


def test_trust_init_forgets_a_time_of_issue_in_the_future_and_no_version(used: Node) -> None:
    """A way out for a clock must be none for a replay."""
    layout = used.context().layout
    with Ledger.writing(layout.ledger) as ledger:
        known = trust_state.read(layout, ledger)
        trust_state.write(layout, ledger, replace(known, issued_at=datetime.now(UTC) + timedelta(days=200)))
    assert used.run("plan").code == 4
    assert run("trust", "init", "--yes", "--config", str(used.folder / "reconcile.toml")).code == 0
    assert used.run("plan").code == 0
    old = (used.folder / "snapshot.json").read_bytes(), (used.folder / "models.lock").read_bytes()
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    (used.folder / "snapshot.json").write_bytes(old[0])
    (used.folder / "models.lock").write_bytes(old[1])

    ran = run("trust", "init", "--yes", "--config", str(used.folder / "reconcile.toml"))

    assert ran.code == 4
    assert "error[rollback]" in ran.err


def test_trust_init_is_not_done_without_a_word(used: Node) -> None:
    before = (used.store / "trust/floor.json").read_bytes()
    for json_ in ([], ["--json"]):
        ran = run("trust", "init", *json_, "--config", str(used.folder / "reconcile.toml"))
        assert ran.code == 64, ran
        assert "--yes" in ran.err
    assert (used.store / "trust/floor.json").read_bytes() == before


@pytest.mark.parametrize(("word", "code"), [("y", 0), ("n", 130), ("", 130)])
def test_trust_init_on_a_terminal_shows_what_is_trusted_and_asks(used: Node, word: str, code: int) -> None:
    fingerprint = run("root", "inspect", str(used.folder / "root.json"), "--json").json["fingerprint"]
    (used.store / "trust/floor.json").unlink()

    ended, said = at_a_terminal(["trust", "init", "--config", str(used.folder / "reconcile.toml")], word)

    assert ended == code, said
    assert fingerprint in said
    assert "snapshot 1" in said
    assert (used.store / "trust/floor.json").exists() == (code == 0)


def at_a_terminal(arguments: list[str], word: str) -> tuple[int, str]:
    """Run one command line at a terminal of its own, answer *word* to its question, and return how it ended and what was seen."""
    import pty

    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "reconciler", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    os.write(ours, f"{word}\n".encode())
    with contextlib.suppress(OSError):  # how a terminal says that it was hung up
        while data := os.read(ours, 1 << 16):
            seen += data
    os.close(ours)
    return child.wait(timeout=60), seen.decode()


# -- why a model does not serve, and when it is tried again ----------------------------------------


@pytest.fixture
def failing(node: Node) -> Node:
    """A node with a model that serves and one that fails its test job."""
    smoke = {"prompt": "Hello", "max_tokens": 4, "timeout": "60s", "expect": {"text": "Paris"}}
    node.publish(node.item("a:v1", tiny("a")), node.item("wrong:v1", tiny("wrong"), smoke=smoke))
    assert node.run("apply").code == 3
    return node


def test_a_failed_model_says_what_happened_where_it_lies_and_when_it_is_tried_again(failing: Node) -> None:
    said = failing.run("status", "wrong:v1").out

    assert "attempts: 1" in said
    assert "last error: smoke-failed: " in said
    record = Path(said.partition("quarantined: ")[2].partition("\n")[0])
    assert json.loads((record / "record.json").read_bytes())["model"] == "wrong:v1"
    assert "next try: at the next sync" in said
    assert "next try" not in failing.run("status", "a:v1").out
    assert "models that failed, are pending or could not be fetched are retried at the next sync" in failing.run("status").out


def test_programs_read_of_a_failed_model_where_it_lies_and_of_an_agent_when_it_is_tried_again(failing: Node) -> None:
    layout = failing.context().layout
    found = failing.run("status", "--json").json
    good, bad = found["models"]
    assert good["quarantine"] is None
    assert (bad["state"], bad["attempts"]) == ("failed", 1)
    assert (failing.store / bad["quarantine"] / "record.json").is_file()
    assert found["next_sync_at"] is None
    now = datetime.now(UTC)
    for away, shown in ((timedelta(minutes=4), True), (-timedelta(hours=1), False)):  # an agent that died promises nothing
        service.write_health(layout, Health(phase="waiting", started_at=now, next_at=now + away))
        found = failing.run("status", "--json").json
        assert (found["next_sync_at"] is not None) == shown
    service.write_health(layout, Health(phase="waiting", started_at=now, next_at=now + timedelta(minutes=4)))
    assert f"next try: at the next sync, at {now + timedelta(minutes=4):%Y-%m-%dT%H:%M}" in failing.run("status", "wrong:v1").out


def test_a_test_job_that_was_not_asked_for_is_left_out_and_one_that_never_ran_is_null(failing: Node) -> None:
    assert all("test" not in model and "tested_at" not in model for model in failing.run("status", "--json").json["models"])
    assert failing.run("status", "wrong:v1", "--json").json["models"][0]["test"]["verdict"] == "bad"
    failing.publish(failing.item("a:v1", tiny("a")), failing.item("new:v1", tiny("new")))
    assert failing.run("status", "new:v1", "--json").json["models"][0]["test"] is None


def a_folder_for_a_file(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def a_file_for_a_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.write_bytes(b"x")


IN_THE_WAY = [(a_folder_for_a_file, ".lock"), (a_folder_for_a_file, "trust/floor.json"), (a_file_for_a_folder, "staging")]


@pytest.mark.parametrize(("how", "name"), IN_THE_WAY, ids=[name for _, name in IN_THE_WAY])
def test_what_lies_in_the_way_in_the_store_is_to_be_moved(used: Node, how: Callable[[Path], None], name: str) -> None:
    used.publish(used.item("b:v1", tiny("b")))
    how(used.store / name)

    ran = used.run("apply")

    assert ran.code == 1
    assert name in ran.err
    assert "hint: something else is in its place: move it away" in ran.err


def test_a_spoiled_envelope_beside_the_lock_and_settings_that_are_no_text_say_what_to_do(used: Node) -> None:
    (used.folder / "snapshot.json").write_text("{}")
    assert "hint: run `reconcile lock`" in used.run("plan").err

    (used.folder / "reconcile.toml").write_bytes(b"\xff\xfe")
    assert "hint: it is UTF-8 text" in used.run("plan").err


def test_init_writes_no_address_that_lock_refuses(alone: Path) -> None:
    ran = run("init", "--snapshot", "http://u:hidden@127.0.0.1/x")

    assert ran.code == 1
    assert "[network] snapshot" in ran.err
    assert "hidden" not in ran.err
    assert list(alone.iterdir()) == []


@pytest.mark.parametrize("line", ["plan --only", "snapshot add", "status --nope", "trust update", "snapshot add --nope x"])
def test_the_hint_of_wrong_usage_names_the_command_that_was_typed(line: str) -> None:
    ran = run(*line.split())
    words = [word for word in line.split() if not word.startswith("-")][: 2 if line.startswith(("snapshot", "trust")) else 1]
    assert ran.code == 64
    assert f"hint: see `reconcile {' '.join(words)} --help`" in ran.err
