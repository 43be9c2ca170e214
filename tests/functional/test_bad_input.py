"""Bad input: a clear message, its exit code, and a store that is as it was."""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.demand import own_disk
from tests.node import Node, Ran, tiny, traces


def refused(node: Node, ran: Ran, code: int, name: str) -> None:
    assert ran.code == code, ran
    assert json.loads(ran.out)["error"]["name"] == name, ran
    assert ran.err.startswith(f"error[{name}]: ")
    assert "Traceback" not in ran.err


def offered(node: Node, envelope: bytes, name: str) -> Ran:
    """Offer *envelope* to `lock`; check that nothing but the log of it changed."""
    before = traces(node.folder, ledger=False)
    (node.folder / "published.json").write_bytes(envelope)

    ran = node.run("lock", "--json")

    refused(node, ran, 4, name)
    after = traces(node.folder, ledger=False)
    for changing in (".", "published.json", "store"):  # what the test wrote, and where the ledger's journal comes and goes
        before.pop(changing, None), after.pop(changing, None)
    assert after == before
    return ran


def test_one_flipped_bit_is_refused(used: Node) -> None:
    envelope = json.loads(used.network.snapshot(used.item("a:v1", tiny("a"))))
    payload = bytearray(base64.b64decode(envelope["payload"]))
    payload[len(payload) // 2] ^= 1
    envelope["payload"] = base64.b64encode(payload).decode()

    offered(used, json.dumps(envelope).encode(), "bad-signature")


def test_unsigned_is_refused(used: Node) -> None:
    offered(used, used.network.snapshot(used.item("a:v1", tiny("a")), signers=()), "bad-signature")


def test_another_network_is_refused(used: Node) -> None:
    offered(used, used.network.snapshot(used.item("a:v1", tiny("a")), network="elsewhere"), "wrong-network")


def test_a_17_mib_envelope_is_refused(used: Node) -> None:
    offered(used, b"{" + b" " * (17 << 20) + b"}", "too-large")


def test_an_older_snapshot_is_refused(used: Node) -> None:
    old = used.network.snapshot(used.item("a:v1", tiny("a")))
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    offered(used, old, "rollback")


def test_two_snapshots_of_one_version_are_refused(used: Node) -> None:
    other = used.network.snapshot(used.item("b:v1", tiny("b")), version=used.network.version)
    offered(used, other, "equivocation")


def artifact(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda model: model["artifacts"][0].update(changes)


GOOD = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (artifact(path="../x"), "models[0].artifacts[0].path"),
        (artifact(path="/x"), "models[0].artifacts[0].path"),
        (artifact(path="a\\b"), "models[0].artifacts[0].path"),
        (artifact(path="a\nb"), "models[0].artifacts[0].path"),
        (artifact(digest=GOOD.upper()), "models[0].artifacts[0].digest"),
        (artifact(digest=GOOD[:-1]), "models[0].artifacts[0].digest"),
        (artifact(digest=GOOD + "\n"), "models[0].artifacts[0].digest"),
        (artifact(digest="md5:" + "a" * 31), "models[0].artifacts[0].digest"),
        (artifact(size=0), "models[0].artifacts[0].size"),  # it is the entrypoint
        (artifact(size=-1), "models[0].artifacts[0].size"),
        (artifact(size=1.0), "models[0].artifacts[0].size"),
        (artifact(urls=["file:///etc/passwd"]), "models[0].artifacts[0].urls[0]"),
        (artifact(unpack="r/ar"), "models[0].artifacts[0].unpack"),
        (lambda model: model.update(name="../a"), "models[0].name"),
        (lambda model: model.update(state="On"), "models[0].state"),
        (lambda model: model.update(tasks=["Paint"]), "models[0].tasks"),
        (lambda model: model.update(requires="answer"), "models[0].requires"),
        (lambda model: model.update(entrypoint="other.gguf"), "models[0].entrypoint"),
    ],
)
def test_a_snapshot_that_means_nothing_says_where(used: Node, spoil: Callable[[dict[str, Any]], None], expected: str) -> None:
    model = used.item("a:v1", tiny("a"))
    spoil(model)

    ran = offered(used, used.network.snapshot(model), "bad-envelope")

    assert expected in ran.err


def test_duplicate_ids_are_refused(used: Node) -> None:
    model = used.item("a:v1", tiny("a"))
    ran = offered(used, used.network.snapshot(model, model), "bad-envelope")
    assert "duplicate id 'a:v1'" in ran.err


def test_duplicate_json_keys_are_refused(used: Node) -> None:
    payload = json.dumps(used.network.snapshot_document(used.item("a:v1", tiny("a")))).replace('"schema": 1', '"schema": 1, "schema": 1')
    ran = offered(used, used.network.sign_snapshot(payload.encode()), "bad-envelope")
    assert "duplicate key 'schema'" in ran.err


@pytest.mark.parametrize("command", ["plan", "apply", "status", "verify"])
def test_an_edited_lock_is_refused(used: Node, command: str) -> None:
    lock = used.folder / "models.lock"
    lock.write_text(lock.read_text().replace("max_tokens = 4", "max_tokens = 5"))
    before = traces(used.store, ledger=False)

    ran = used.run(command, "--json")

    refused(used, ran, 4, "lock-mismatch") if command != "apply" else None
    assert ran.code == 4
    assert "models.lock is not what its snapshot compiles to" in ran.err
    before.pop("."), (after := traces(used.store, ledger=False)).pop(".")
    assert after == before


@pytest.mark.parametrize("command", ["plan", "status", "verify"])
def test_a_lock_without_its_envelope_is_refused(used: Node, command: str) -> None:
    (used.folder / "snapshot.json").unlink()
    refused(used, used.run(command, "--json"), 4, "lock-mismatch")


def test_an_unknown_key_names_the_nearest_known(used: Node) -> None:
    used.configure('grase = "1h"\n')
    ran = used.run("plan", "--json")
    refused(used, ran, 1, "bad-settings")
    assert "hint: did you mean 'store.grace'?" in ran.err


def test_settings_that_are_not_toml_are_refused(used: Node) -> None:
    used.configure("this is [not TOML\n")
    refused(used, used.run("plan", "--json"), 1, "bad-settings")


@pytest.mark.parametrize("text", ["10 gigs", "-1", "1e3", ""])
def test_a_size_that_is_none_is_refused(used: Node, text: str) -> None:
    used.configure(f'quarantine = "{text}"\n')
    ran = used.run("plan", "--json")
    refused(used, ran, 1, "bad-settings")
    assert "quarantine" in ran.err


@pytest.mark.parametrize("command", ["plan", "apply", "lock", "verify"])
def test_a_store_that_is_a_file_is_refused(node: Node, command: str) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    node.configure('path = "file"\n')
    (node.folder / "file").write_bytes(b"mine")

    ran = node.run(command, "--json")

    assert ran.code == 1, ran
    assert '"name":"store"' in ran.out
    assert (node.folder / "file").read_bytes() == b"mine"


def test_a_second_run_is_refused_while_the_store_is_held(used: Node) -> None:
    before = traces(used.store)
    fd = os.open(used.store / ".lock", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        for command in ("apply", "sync", "verify", "gc", "lock"):
            ran = used.run(command, "--json")
            assert ran.code == 5, ran
            assert f"process {os.getpid()}" in ran.err
        assert used.run("plan").code == 0
        assert used.run("status").code == 0
    finally:
        os.close(fd)
    assert traces(used.store) == before


MISUSES = [["--frob"], ["plan", "--frob"], ["nonsense"], ["apply", "no-such-plan.json"], ["gc", "--max", "lots"]]


@pytest.mark.parametrize("arguments", MISUSES)
def test_wrong_usage_exits_with_64(arguments: list[str]) -> None:
    from tests.node import run

    ran = run(*arguments)

    assert ran.code == 64
    assert ran.err.startswith("error[usage]: ")
    assert "hint: " in ran.err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 4 MiB."""
    with own_disk(tmp_path / "small", 4, "the check for a full disk") as place:
        yield place


def test_no_space_is_refused_before_the_first_byte(node: Node, small_disk: Path) -> None:
    node.configure(f'path = "{small_disk}/store"\n')
    big = tiny("big", "completion", 512)
    node.publish(node.item("big:v1", big))
    before = traces(small_disk, ledger=False)

    ran = node.run("apply", "--json")

    assert ran.code == 1
    assert json.loads(ran.out.splitlines()[-1])["error"]["name"] == "disk-full"
    assert "short" in ran.err
    assert not [path for path in (small_disk / "store").rglob("*") if path.is_file() and "blobs" in path.parts]
    assert {key: value for key, value in traces(small_disk, ledger=False).items() if "blobs/" in key} == {
        key: value for key, value in before.items() if "blobs/" in key
    }


def test_no_space_is_an_incident_once_and_its_hint_brings_the_rest(node: Node, small_disk: Path) -> None:
    """A node looks every five minutes, and its disk is full for days."""
    node.configure(f'path = "{small_disk}/store"\n')
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    node.publish(node.item("a:v1", tiny("a")), node.item("big:v1", tiny("big", "completion", 512)), node.item("small:v1", tiny("small")))

    for command in ("sync", "apply"):
        ran = node.run(command)
        assert ran.code == 1, ran
        assert "error[disk-full]: not enough space" in ran.err
        assert "hint: free " in ran.err
        assert "`reconcile apply --except big:v1`" in ran.err

    logged = [(one["times"], one["detail"]) for one in node.run("incidents", "--json").json if one["kind"] == "disk-full"]
    assert [times for times, _ in logged] == [2]
    assert "needed for big:v1, small:v1" in logged[0][1]
    assert node.run("apply", "--except", "big:v1").code == 0
    assert node.states() == {"a:v1": "active", "big:v1": "absent", "small:v1": "active"}


@pytest.mark.parametrize("address", ["http://127.0.0.1:99999/x", "http://127.0.0.1:abc/x", "http://[bad/x", "http://u:hidden@127.0.0.1/x"])
@pytest.mark.parametrize("key", ["snapshot", "root_updates"])
def test_an_address_that_is_none_is_named_by_its_key_and_not_shown(node: Node, address: str, key: str) -> None:
    (node.folder / "reconcile.toml").write_text(f'[network]\n{key} = "{address}{{version}}"\n')

    for command in (["lock"], ["sync", "--json"]):
        refused = node.run(*command)
        assert refused.code == 1
        assert f"[network] {key}" in refused.out + refused.err
        assert "Traceback" not in refused.out + refused.err
        assert "hidden" not in refused.out + refused.err


@pytest.mark.parametrize("address", ["http://127.0.0.1:99999/x", "http://[bad/x", "ftp://u:hidden@127.0.0.1/x?token=hidden"])
def test_an_address_that_is_none_is_refused_as_an_argument(node: Node, address: str) -> None:
    refused = node.run("lock", address)

    assert refused.code != 0
    assert "Traceback" not in refused.out + refused.err
    assert "hidden" not in refused.out + refused.err


@pytest.mark.parametrize("command", ["incidents", "history"])
def test_a_number_beyond_all_bounds_is_wrong_usage(node: Node, command: str) -> None:
    assert node.run(command, "-n", "9" * 20).code == 64


@pytest.mark.parametrize("own", ["reconcile.toml", "models.lock", "root.json", "snapshot.json", "published.json", "store/ledger.db"])
@pytest.mark.parametrize("option", ["plan --out", "plan --json-into", "status --json-into", "agent --once --metrics-file"])
@pytest.mark.parametrize("link", ["", "by a link"])
def test_nothing_is_written_over_what_the_node_lives_by(used: Node, option: str, own: str, link: str) -> None:
    place = used.folder / own
    before = place.read_bytes()
    named = used.folder / "elsewhere" if link else place
    if link:
        named.symlink_to(place)

    command, *words = option.split()
    ran = used.run(command, *words, str(named))

    assert ran.code == 64, ran
    assert "is not overwritten" in ran.err
    assert place.read_bytes() == before


@pytest.mark.parametrize("own", ["reconcile.toml", "models.lock"])
def test_a_refusal_of_the_settings_is_not_written_over_them_either(used: Node, own: str) -> None:
    (used.folder / "reconcile.toml").write_text("[store\n")
    before = (used.folder / own).read_bytes()

    assert used.run("status", "--json-into", str(used.folder / own)).code == 64
    assert (used.folder / own).read_bytes() == before


def test_credentials_that_are_gone_are_no_fault_of_a_model(used: Node) -> None:
    """What needs no download goes on, what needs one is tried again; nobody is reported to have failed a test."""
    used.publish(used.item("b:v1", tiny("b")))
    used.configure('[download]\nnetrc = "gone"\n')

    ran = used.run("apply")

    assert ran.code == 3, ran
    assert "cannot read the credentials in" in ran.out
    assert used.active() == []
    assert "smoke-failed" not in used.kinds()
    assert used.records() == []
    used.configure("")
    assert used.run("apply").code == 0
    assert used.active() == ["b:v1"]


def test_a_plan_that_cannot_be_saved_is_named(used: Node) -> None:
    ran = used.run("plan", "--out", "/dev/full")

    assert ran.code == 1
    assert "/dev/full: No space left on device" in ran.err


def test_a_file_that_is_larger_than_the_system_takes_is_blamed_on_no_model(used: Node) -> None:
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b", width=64)))

    ran = subprocess.run(
        [sys.executable, "-m", "reconciler", "apply", "--config", used.folder / "reconcile.toml"],
        capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, 100 << 10)),
    )  # fmt: skip

    assert ran.returncode == 3, ran
    assert "File too large" in ran.stdout
    assert used.states() == {"a:v1": "active", "b:v1": "absent"}
    assert used.kinds() == []
    assert used.records() == []
    assert used.run("apply").code == 0
    assert used.states() == {"a:v1": "active", "b:v1": "active"}


@pytest.mark.parametrize(("number", "told", "hint"), [
    (errno.EDQUOT, "Disk quota exceeded", "quota -s"), (errno.EROFS, "Read-only file system", "dmesg"),
    (errno.ENOSPC, "No space left on device", "gc --dry-run"), (errno.EFBIG, "File too large", "ulimit -f"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["blobs", "trees", "generations"])
def test_what_the_file_system_refuses_is_told_as_what_it_is_and_blamed_on_no_model(
    used: Node, monkeypatch: pytest.MonkeyPatch, number: int, told: str, hint: str, where: str
) -> None:
    rename = os.rename

    def refuse(old: str, new: str, **options: int) -> None:
        if f"/store/{where}/" in str(new):
            raise OSError(number, os.strerror(number), str(old))
        rename(old, new, **options)

    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", refuse)
        ran = used.run("apply")

    assert ran.code == (1 if where == "generations" else 3)
    assert told in ran.out + ran.err
    assert where != "generations" or hint in ran.err
    assert used.states()["a:v1"] == "active"
    assert used.states()["b:v1"] in {"absent", "pending", "inactive"}
    assert {*used.kinds()} <= {"disk-full"}
    assert used.records() == []
    assert used.run("apply").code == 0
    assert used.states() == {"a:v1": "active", "b:v1": "active"}
