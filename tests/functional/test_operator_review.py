"""Those who sign, at their terminals: what they are shown, and what they cannot be made to sign."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from reconciler.publish import external_signer
from tests.functional.test_operator import REPOSITORY, Terminal, accepted, ready, terminal

__all__ = ["ready", "terminal"]

_SIGNER = """\
import sys
from cryptography.hazmat.primitives.serialization import load_pem_private_key
key = load_pem_private_key(open(sys.argv[1], "rb").read(), None)
sys.stdout.buffer.write(key.sign(sys.stdin.buffer.read() + {suffix!r}.encode()))
"""


def signer(folder: Path, key: str, suffix: str = "") -> str:
    (folder / "signer.py").write_text(_SIGNER.format(suffix=suffix))
    return f"{sys.executable} {folder / 'signer.py'} {folder / key}"


def digest_of(ready: Terminal) -> str:
    found: str = ready.json("snapshot inspect snapshot.json")["digest"]
    return found


def test_only_what_was_reviewed_is_signed(ready: Terminal) -> None:
    reviewed = digest_of(ready)
    ready("snapshot set-state snapshot.json tiny:v1 disabled")
    before = ready.bytes("snapshot.json")
    ready(f"snapshot sign snapshot.json --key carol.key --reviewed {reviewed}", code=1)
    assert "the file was changed since" in ready.err
    ready(f"snapshot sign snapshot.json --key carol.pub --reviewed {reviewed} --signer", signer(ready.folder, "carol.key"), code=1)
    ready("snapshot sign snapshot.json --key carol.key --reviewed sha256:", code=1)
    assert ready.bytes("snapshot.json") == before
    ready(f"snapshot sign snapshot.json --key carol.key --reviewed {digest_of(ready)}")
    assert "signed snapshot.json" in ready.out


def test_inspect_full_shows_what_a_second_signer_must_see(ready: Terminal) -> None:
    ready("snapshot inspect snapshot.json --full")
    for told in (
        'models[tiny:v1].artifacts[tiny.gguf].urls: ["https://models.example.org/tiny.gguf"]',
        'models[tiny:v1].smoke.prompt: "Hello"',
        'models[tiny:v1].runtime.engine: "llama-cpp"',
        "models[tiny:v1].smoke.expect.min_tokens: 1",
    ):
        assert told in ready.out


def test_a_difference_shows_expiry_and_every_value_of_an_added_model(ready: Terminal) -> None:
    (ready.folder / "before.json").write_bytes(ready.bytes("snapshot.json"))
    ready("snapshot add snapshot.json tiny:v2 tiny.gguf --url https://other.example.org/tiny.gguf")
    ready("snapshot set snapshot.json --expires 60d")
    ready("snapshot diff before.json snapshot.json")
    assert " -> 20" in ready.out.splitlines()[1]
    assert "! tiny:v2 starts in place of tiny:v1" in ready.out
    assert "! nodes may ask hosts that they did not ask before: other.example.org" in ready.out
    assert '    artifacts[tiny.gguf].urls: ["https://other.example.org/tiny.gguf"]' in ready.out
    told = ready.out
    assert f"to sign it: --reviewed {digest_of(ready)}" in told


def test_a_difference_in_markdown_is_inert(ready: Terminal) -> None:
    (ready.folder / "before.json").write_bytes(ready.bytes("snapshot.json"))
    ready("snapshot add snapshot.json evil:v1 tiny.gguf --prompt", "x | y\n![](https://h/x) <img src=x> @everyone `code` [a](b)")
    ready("snapshot diff before.json snapshot.json --format markdown")
    rows = [line for line in ready.out.splitlines() if line.startswith("| ")]
    assert all(row.count("|") == 5 for row in rows)
    (prompt,) = [row for row in rows if "smoke.prompt" in row]
    assert not set("<>![]`@(") & set(prompt)


def test_a_command_signs_with_a_key_that_this_program_never_reads(ready: Terminal) -> None:
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.pub --root root.1.json --signer", signer(ready.folder, f"{name}.key"))
    assert "complete: nodes will accept it" in ready.out
    assert accepted(ready).snapshot.version == 1
    ready("root new draft.json --network testnet --root-key alice.pub --snapshot-key carol.pub")
    ready("root sign draft.json --key alice.pub --signer", signer(ready.folder, "alice.key"))


#: Signers that are not to be believed, as Python programs, and the exit code of who believed them not.
LIARS = {
    "signs other bytes": (_SIGNER.format(suffix="x"), 4),
    "signs only the first bytes": (_SIGNER.format(suffix="").replace("stdin.buffer.read()", "stdin.buffer.read(64)"), 4),
    "signs with another key": (_SIGNER.format(suffix="").replace("sys.argv[1]", "sys.argv[2]"), 4),
    "signs and fails": (f"{_SIGNER.format(suffix='')}sys.exit(1)", 1),
    "is killed": ("import os\nos.kill(os.getpid(), 9)", 1),
    "writes 64 bytes of nonsense": ("import os\nos.write(1, os.urandom(64))", 4),
    "writes nonsense in base64": ("import base64, os\nprint(base64.b64encode(os.urandom(64)).decode())", 4),
    "writes a text": ("print('signed')", 4),
    "writes nothing": ("", 4),
    "writes without end": ("while True: print('x' * 1_000_000)", 4),
    "hangs": ("import time\ntime.sleep(600)", 1),
    "writes a part and hangs": ("import sys, time\nprint('AAAA', flush=True)\ntime.sleep(600)", 1),
    "closes its output and hangs": ("import os, time\nos.close(1)\ntime.sleep(600)", 1),
}


@pytest.mark.parametrize("kind", LIARS)
def test_a_signer_that_lies_or_fails_changes_nothing(ready: Terminal, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_signer, "_SECONDS", 2.0 if "hangs" in kind else 60.0)
    program, code = LIARS[kind]
    (ready.folder / "liar.py").write_text(program)
    before = {path.name: path.read_bytes() for path in ready.folder.iterdir() if path.is_file()}
    for line, key in (("snapshot sign snapshot.json", "carol"), ("root sign root.1.json", "alice")):
        ready(f"{line} --key {key}.pub --signer", f"{sys.executable} liar.py {key}.key dave.key", code=code)
        assert "Traceback" not in ready.err
    assert {path.name: path.read_bytes() for path in ready.folder.iterdir() if path.is_file()} == before
    assert not psutil.Process().children()


@pytest.mark.parametrize(("command", "why"), [("/nowhere/sign", "cannot be run"), (" ", "is empty"), ("sign 'x", "is not one")])
def test_a_signer_that_is_none_changes_nothing(ready: Terminal, command: str, why: str) -> None:
    before = ready.bytes("snapshot.json")
    ready("snapshot sign snapshot.json --key carol.pub --signer", command, code=1)
    assert why in ready.err
    assert ready.bytes("snapshot.json") == before


@pytest.mark.parametrize(("answer", "signed"), [("y\n", True), ("n\n", False)])
def test_on_a_terminal_who_signs_is_shown_all_and_asked(ready: Terminal, answer: str, signed: bool) -> None:
    before = ready.bytes("snapshot.json")
    master, slave = pty.openpty()
    command = [sys.executable, str(REPOSITORY / "cli.py"), "snapshot", "sign", "snapshot.json", "--key", "carol.key"]
    with subprocess.Popen(command, cwd=ready.folder, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        os.close(slave)
        os.write(master, answer.encode())
        _, err = process.communicate(timeout=60)
    os.close(master)
    assert b'models[tiny:v1].smoke.prompt: "Hello"' in err
    assert f"Sign snapshot {digest_of(ready)}?".encode() in err
    assert (ready.bytes("snapshot.json") != before) is signed


def test_what_is_listed_is_a_valid_bill_of_materials(ready: Terminal) -> None:
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from cyclonedx.validation import make_schemabased_validator

    ready("snapshot export snapshot.json --format cyclonedx --out models.cdx.json")
    text = ready.bytes("models.cdx.json").decode()
    assert make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6).validate_str(text) is None
    (model,) = json.loads(text)["components"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "tiny", "v1")
    assert model["components"][0]["hashes"][0]["alg"] == "SHA-256"
    assert ready("snapshot export snapshot.json --format cyclonedx") == text
