"""
The demo network: five tiny real models, the keys that sign them, and the committed files.

``root.json``, ``snapshot.json`` and ``models.lock`` at the top of the repository were made once by
``python -m reconciler.demo.network FOLDER`` and are valid to 2036; their private keys were never written anywhere, so to change the
models is to make a new network. They list exactly ``all_models``; a test makes those anew and compares the digests.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from msgspec import Struct

from reconciler.core import digest, trust
from reconciler.core import lock as locks
from reconciler.core.errors import StoreError
from reconciler.core.snapshot import Artifact, Expect, Model, Runtime, Smoke, Snapshot
from reconciler.core.trust import TrustState
from reconciler.demo import models
from reconciler.demo.models import Shape
from reconciler.publish import keys, roots, snapshots
from reconciler.publish.keys import KeyPair
from reconciler.store import atomic

NAME = "resultity-demo"
ISSUED = datetime(2026, 11, 20, tzinfo=UTC)
EXPIRES = datetime(2036, 11, 20, tzinfo=UTC)
#: The committed files.
FILES = ("root.json", "snapshot.json", "models.lock")

_RUNTIME = Runtime(engine="llama-cpp", version=">=0.3,<0.5")
_TOO_MUCH = 1 << 50


def committed_folder() -> Path:
    """
    Return where the committed files lie: at the top of a checkout, or beside this module in an installed package.

    Raises:
        StoreError: they are nowhere.
    """
    for place in (Path(__file__).parents[2], Path(__file__).parent):
        if all((place / name).is_file() for name in FILES):
            return place
    raise StoreError("the demo network's files are not installed", hint="install the package again, or run from a checkout")


# -- models ----------------------------------------------------------------------------------------


class DemoModel(Struct, frozen=True, kw_only=True):
    """A model with the bytes of its artifact; None for a model that is never fetched."""

    model: Model
    data: bytes | None


def parrot(version: str = "v1", urls: tuple[str, ...] = ()) -> DemoModel:
    """Return a model that completes text; each version has other weights."""
    data = _gguf(Shape(seed=f"parrot:{version}", width=256, layers=2, heads=4))
    smoke = Smoke(prompt="The capital of France is", max_tokens=8, expect=Expect(min_tokens=1), timeout="60s")
    return _single_file("parrot", version, "parrot.gguf", data, urls, smoke)


def chatter(urls: tuple[str, ...] = ()) -> DemoModel:
    """Return a chat model inside a ``tar.zst``."""
    inner = _gguf(Shape(seed="chatter:v1", kind="chat", width=128, layers=2, heads=4))
    data = models.zst(models.tar({"chatter/README.txt": b"A model that answers, and knows nothing.\n", "chatter/chatter.gguf": inner}))
    smoke = Smoke(task="chat", prompt="Hello!", max_tokens=8, expect=Expect(min_tokens=1), timeout="60s")
    artifact = Artifact(path="chatter.tar.zst", digest=digest.of(data), size=len(data), urls=urls, unpack="tar.zst")
    model = Model(
        name="chatter", version="v1", tasks=("chat", "completion"), runtime=_RUNTIME, artifacts=(artifact,),
        entrypoint="chatter/chatter.gguf", smoke=smoke, memory=16 << 20,
    )  # fmt: skip
    return DemoModel(model=model, data=data)


def compass(urls: tuple[str, ...] = ()) -> DemoModel:
    """Return an embedding model."""
    data = _gguf(Shape(seed="compass:v1", kind="embedding", width=64))
    smoke = Smoke(task="embedding", prompt="north", max_tokens=1, expect=Expect(dimension=64), timeout="60s")
    return _single_file("compass", "v1", "compass.gguf", data, urls, smoke)


def colossus(urls: tuple[str, ...] = ()) -> DemoModel:
    """Return a model that needs more GPU memory than any node has: nothing is ever fetched for it."""
    artifact = Artifact(path="colossus.gguf", digest=digest.of(b"nobody has these bytes"), size=_TOO_MUCH, urls=urls)
    model = Model(
        name="colossus", version="v1", tasks=("completion",), runtime=_RUNTIME, gpu_memory=_TOO_MUCH, artifacts=(artifact,),
        entrypoint="colossus.gguf",
    )  # fmt: skip
    return DemoModel(model=model, data=None)


def weathercock(urls: tuple[str, ...] = ()) -> DemoModel:
    """Return a good model whose server sends other bytes at first."""
    data = _gguf(Shape(seed="weathercock:v1", width=64))
    smoke = Smoke(prompt="The wind comes from the", max_tokens=8, expect=Expect(min_tokens=1), timeout="60s")
    return _single_file("weathercock", "v1", "weathercock.gguf", data, urls, smoke)


def all_models() -> tuple[DemoModel, ...]:
    """Return the models of the committed snapshot."""
    return (parrot(), chatter(), compass(), colossus(), weathercock())


def _single_file(name: str, version: str, path: str, data: bytes, urls: tuple[str, ...], smoke: Smoke) -> DemoModel:
    artifact = Artifact(path=path, digest=digest.of(data), size=len(data), urls=urls)
    model = Model(
        name=name, version=version, tasks=(smoke.task,), runtime=_RUNTIME, artifacts=(artifact,), entrypoint=path, smoke=smoke,
        memory=16 << 20,
    )  # fmt: skip
    return DemoModel(model=model, data=data)


def _gguf(shape: Shape) -> bytes:
    with tempfile.TemporaryDirectory(prefix="reconcile-demo-") as folder:
        path = Path(folder, "model.gguf")
        models.write(shape, path)
        return path.read_bytes()


# -- keys and signatures ---------------------------------------------------------------------------


class Network(Struct, frozen=True, kw_only=True):
    """A network's keys: two that must both sign snapshots, and a third that signs roots."""

    name: str
    owners: tuple[KeyPair, ...]
    signers: tuple[KeyPair, ...]
    root: bytes


def new_network(name: str, now: datetime, lifetime: timedelta) -> Network:
    """Return a new network with keys of its own."""
    owners, signers = (keys.generate(),), (keys.generate(), keys.generate())
    made = roots.new(name, now + lifetime, ([_public(pair) for pair in owners], 1), ([_public(pair) for pair in signers], 2))
    return Network(name=name, owners=owners, signers=signers, root=roots.sign(made, _private(owners[0])))


def signed_snapshot(network: Network, models: tuple[Model, ...], version: int, now: datetime, lifetime: timedelta) -> bytes:
    """Return a snapshot of *models*, signed by all of the network's signers."""
    empty = snapshots.new(network.name, now=now, lifetime=lifetime, version=version)

    def listed(found: Snapshot) -> Snapshot:
        for model in models:
            found = snapshots.with_model(found, model)
        return found

    data = snapshots.edit(empty, listed, now=now).data
    for pair in network.signers:
        data = snapshots.sign(data, _private(pair), now=now)
    return data


def _public(pair: KeyPair) -> keys.PublicKey:
    return keys.load_public(pair.public_pem.encode())


def _private(pair: KeyPair) -> Any:
    return keys.load_private(pair.private_pem, lambda: b"")


def main() -> None:
    """Make a new network and write its three files."""
    target = Path(sys.argv[1])
    made = new_network(NAME, ISSUED, EXPIRES - ISSUED)
    models = tuple(item.model for item in all_models())
    envelope = signed_snapshot(made, models, 1, ISSUED, EXPIRES - ISSUED)
    verified = trust.verify(envelope, trust.pin(made.root), now=datetime.now(UTC), trust_state=TrustState())
    for name, data in zip(FILES, (made.root, envelope, locks.encode(locks.compile(verified))), strict=True):
        atomic.write(target / name, data)


if __name__ == "__main__":
    main()
