"""
Keys that stay in a token sign roots and snapshots: a real SoftHSM, through its PKCS #11 module.

Those tests need the Debian package softhsm2. Signers that lie are in ``test_operator_review``.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pkcs11
import pkcs11.util.ec
import pytest

from reconciler.core.errors import PublishError
from reconciler.publish import pkcs11_token
from tests.functional.test_operator import REPOSITORY, Terminal, accepted, ready, terminal

__all__ = ["ready", "terminal"]

MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so")
MODULE = next((path for path in MODULES if Path(path).exists()), "")
needs_softhsm = pytest.mark.skipif(not MODULE, reason="SoftHSM is not installed here: apt install softhsm2")
needs_opensc = pytest.mark.skipif(shutil.which("pkcs11-tool") is None, reason="OpenSC is not installed here: apt install opensc")

_PIN = "4711"
PROGRAM = (sys.executable, str(REPOSITORY / "cli.py"))


class Token:
    """A token of a SoftHSM that the test alone has, with the file that its PIN is in."""

    def __init__(self, folder: Path) -> None:
        self.pin = folder / "pin"
        self.pin.write_text(f"{_PIN}\n")
        self.pin.chmod(0o600)

    def uri(self, name: str, token: str = "release") -> str:
        return f"pkcs11:token={token};object={name}?module-path={MODULE}"

    def make(self, name: str, curve: str = "") -> None:
        with pkcs11.lib(MODULE).get_token(token_label="release").open(user_pin=_PIN, rw=True) as session:
            if curve:
                given = {pkcs11.Attribute.EC_PARAMS: pkcs11.util.ec.encode_named_curve_parameters(curve)}
                made = session.create_domain_parameters(pkcs11.KeyType.EC, given, local=True)
            else:
                given = {pkcs11.Attribute.EC_PARAMS: b"\x13\x0cedwards25519"}
                made = session.create_domain_parameters(pkcs11.KeyType.EC_EDWARDS, given, local=True)
            made.generate_keypair(store=True, label=name, id=secrets.token_bytes(4))


@pytest.fixture(scope="session")
def softhsm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the configuration of a SoftHSM with one token; its library reads it once in a process."""
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(folder / "softhsm2.conf")
    line = ["softhsm2-util", "--init-token", "--free", "--label", "release", "--so-pin", "87654321", "--pin", _PIN]
    subprocess.run(line, check=True, capture_output=True, timeout=60)
    return folder / "softhsm2.conf"


@pytest.fixture
def token(softhsm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Token:
    monkeypatch.setenv("SOFTHSM2_CONF", str(softhsm))
    return Token(tmp_path)


@needs_softhsm
def test_a_key_that_never_leaves_its_token_signs_a_root_and_a_snapshot_and_nodes_take_both(ready: Terminal, token: Token) -> None:
    for name in ("root-2026", "ci-2026"):
        token.make(name)
        (ready.folder / f"{name}.pub").write_text(ready("key show", token.uri(name)))
    ready("root new hsm.json --network testnet --root-key root-2026.pub --snapshot-key ci-2026.pub --label", "ci-2026.pub=CI, in the HSM")
    ready(f"root sign hsm.json --key root-2026.pub --passphrase-file {token.pin} --signer", token.uri("root-2026"))
    assert "complete: nodes will accept it" in ready.out
    for number in range(40):  # more bytes than a tool that signs in parts sends at once
        ready(f"snapshot add snapshot.json more{number}:v1 tiny.gguf --url https://models.example.org/{number}.gguf")
    ready(f"snapshot sign snapshot.json --key ci-2026.pub --root hsm.json --passphrase-file {token.pin} --signer", token.uri("ci-2026"))
    assert '"CI, in the HSM"' in ready.out
    assert len(accepted(ready, root="hsm.json").snapshot.models) == 41


@needs_softhsm
def test_the_pin_is_on_no_command_line_and_in_no_message(ready: Terminal, token: Token) -> None:
    assert _PIN not in " ".join(pkcs11_token.command("sign", token.uri("any"), token.pin))
    with pytest.raises(PublishError, match="has a PIN in it") as found:
        pkcs11_token.command("sign", f"{token.uri('any')}&pin-value={_PIN}", None)
    assert _PIN not in found.value.message + found.value.hint


@needs_softhsm
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("another key", "not one of key"),
        ("wrong pin", "the PIN is wrong"),
        ("no terminal", "no terminal to ask for the PIN"),
        ("no such key", "no private keys"),
        ("two keys", "2 private keys"),
        ("no such token", "no tokens"),
        ("another curve", "did not sign"),
        ("no module", "gives no tokens"),
        ("not a module", "gives no tokens"),
    ],
)
def test_a_token_that_does_not_sign_for_the_key_changes_nothing(ready: Terminal, token: Token, kind: str, why: str) -> None:
    name = f"key of {kind}".replace(" ", "-")
    token.make(name, "secp256r1" if kind == "another curve" else "")
    if kind == "two keys":
        token.make(name)
    uri = token.uri("nobody" if kind == "no such key" else name, "elsewhere" if kind == "no such token" else "release")
    if kind in {"no module", "not a module"}:
        module = ready.folder / "module.so" if kind == "no module" else REPOSITORY / "README.md"
        uri = uri.replace(MODULE, str(module))
    if kind == "wrong pin":
        token.pin.write_text("0815")
    pin = [] if kind == "no terminal" else ["--passphrase-file", str(token.pin)]
    before = {path.name: path.read_bytes() for path in ready.folder.iterdir() if path.is_file()}
    for line in ("snapshot sign snapshot.json --key carol.pub", "root sign root.1.json --key alice.pub"):
        ran = subprocess.run(
            [*PROGRAM, *line.split(), *pin, "--signer", uri], cwd=ready.folder, capture_output=True, text=True, timeout=60,
            start_new_session=True,
        )  # fmt: skip
        assert ran.returncode == (4 if kind == "another key" else 1), ran.stderr
        assert why in ran.stderr
        assert kind != "wrong pin" or "the PIN is wrong; a token locks itself after a few of those" in ran.stderr
        assert "Traceback" not in ran.stderr
    assert {path.name: path.read_bytes() for path in ready.folder.iterdir() if path.is_file()} == before


@needs_softhsm
def test_a_key_that_is_not_ed25519_is_not_shown_as_one(ready: Terminal, token: Token) -> None:
    token.make("p256", "secp256r1")
    ran = subprocess.run([*PROGRAM, "key", "show", token.uri("p256")], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "not an Ed25519 key" in ran.stderr
    assert "`pkcs11-tool --keypairgen --key-type EC:edwards25519` makes one" in ran.stderr
    assert ran.stdout == ""
    ran = subprocess.run([*PROGRAM, "key", "show", token.uri("nobody")], capture_output=True, text=True, timeout=60)
    assert "some tokens show public keys only to who knows the PIN: give --passphrase-file" in ran.stderr


def test_without_the_package_for_tokens_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    with pytest.raises(PublishError) as refused:
        pkcs11_token._token(pkcs11_token.parse("pkcs11:object=k?module-path=/gone.so"))
    assert refused.value.hint == "`pip install python-pkcs11` installs it"


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("pkcs11:token=release?module-path=/m.so", "names no key"),
        ("pkcs11:object=a", "names no module"),
        ("pkcs11:object=a;color=red?module-path=/m.so", "'color'"),
        ("pkcs11:object=a?module-path=/m.so&module-name=m", "'module-name'"),
        ("pkcs11:release?module-path=/m.so", "no part"),
        ("pkcs11:object=a?module-path=/m.so&pin-source=/pin", "PIN"),
    ],
)
def test_a_uri_that_does_not_name_one_key_is_refused(uri: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PKCS11_MODULE", raising=False)
    with pytest.raises(PublishError, match=re.escape(why)):
        pkcs11_token.parse(uri)


def test_a_uri_is_read_as_rfc_7512_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pkcs11_token.parse(
        "pkcs11:model=SoftHSM%20v2;serial=0a1b;token=my%3Btoken;id=%01%ff;object=a%20b;type=private?module-path=/m.so"
    )
    assert found.attributes == {"model": b"SoftHSM v2", "serial": b"0a1b", "token": b"my;token", "id": b"\x01\xff", "object": b"a b"}
    monkeypatch.setenv("PKCS11_MODULE", "/other.so")
    assert pkcs11_token.parse("pkcs11:id=%01").module == "/other.so"


@needs_softhsm
@needs_opensc
def test_the_lines_of_the_page_work(token: Token, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/how-to/keys-in-hardware.md").read_text()
    lines = "".join(re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    lines = lines.replace("/usr/lib/softhsm/libsofthsm2.so", MODULE).replace("reconcile ", f"{PROGRAM[0]} {PROGRAM[1]} ")
    (tmp_path / "tiny.bin").write_bytes(b"weights")
    ran = subprocess.run(["sh", "-euc", lines], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("complete: nodes will accept it") == 3
