"""
What the demo network approves: five tiny real models, and what each is there to show.

The committed ``snapshot.json`` and ``models.lock`` describe exactly these; a test makes them anew and compares the digests.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from msgspec import Struct

from reconciler.core import digest
from reconciler.core.snapshot import Artifact, Expect, Model, Runtime, Smoke
from reconciler.demo import models
from reconciler.demo.models import Shape

NETWORK = "resultity-demo"
_RUNTIME = Runtime(engine="llama-cpp", version=">=0.3,<0.5")
_TOO_MUCH = 1 << 50


class Item(Struct, frozen=True, kw_only=True):
    """A model of the catalogue, with the bytes that a server must have for it; none for one that is never fetched."""

    model: Model
    data: bytes | None


def completion(version: str = "v1", urls: tuple[str, ...] = ()) -> Item:
    """Return a model that completes text; each version has other weights."""
    data = _gguf(Shape(seed=f"parrot:{version}", width=256, layers=2, heads=4))
    smoke = Smoke(prompt="The capital of France is", max_tokens=8, expect=Expect(min_tokens=1), timeout="60s")
    return _item("parrot", version, "parrot.gguf", data, urls, smoke)


def chat(urls: tuple[str, ...] = ()) -> Item:
    """Return a chat model inside a ``tar.zst``."""
    inner = _gguf(Shape(seed="chatter:v1", kind="chat", width=128, layers=2, heads=4))
    data = models.zst(models.tar({"chatter/README.txt": b"A model that answers, and knows nothing.\n", "chatter/chatter.gguf": inner}))
    smoke = Smoke(task="chat", prompt="Hello!", max_tokens=8, expect=Expect(min_tokens=1), timeout="60s")
    artifact = Artifact(path="chatter.tar.zst", digest=digest.of(data), size=len(data), urls=urls, unpack="tar.zst")
    model = Model(
        name="chatter", version="v1", tasks=("chat", "completion"), runtime=_RUNTIME, artifacts=(artifact,),
        entrypoint="chatter/chatter.gguf", smoke=smoke, memory=16 << 20,
    )  # fmt: skip
    return Item(model=model, data=data)


def embedding(urls: tuple[str, ...] = ()) -> Item:
    """Return an embedding model."""
    data = _gguf(Shape(seed="compass:v1", kind="embedding", width=64))
    smoke = Smoke(task="embedding", prompt="north", max_tokens=1, expect=Expect(dimension=64), timeout="60s")
    return _item("compass", "v1", "compass.gguf", data, urls, smoke)


def colossus(urls: tuple[str, ...] = ()) -> Item:
    """Return a model that needs more GPU memory than any node has: nothing is ever fetched for it."""
    artifact = Artifact(path="colossus.gguf", digest=digest.of(b"nobody has these bytes"), size=_TOO_MUCH, urls=urls)
    model = Model(
        name="colossus", version="v1", tasks=("completion",), runtime=_RUNTIME, gpu_memory=_TOO_MUCH, artifacts=(artifact,),
        entrypoint="colossus.gguf",
    )  # fmt: skip
    return Item(model=model, data=None)


def weathercock(urls: tuple[str, ...] = ()) -> Item:
    """Return a good model, whose server sends other bytes at first."""
    data = _gguf(Shape(seed="weathercock:v1", width=64))
    smoke = Smoke(prompt="The wind comes from the", max_tokens=8, expect=Expect(min_tokens=1), timeout="60s")
    return _item("weathercock", "v1", "weathercock.gguf", data, urls, smoke)


def everything() -> tuple[Item, ...]:
    """Return the whole catalogue of the committed snapshot."""
    return (completion(), chat(), embedding(), colossus(), weathercock())


def _item(name: str, version: str, path: str, data: bytes, urls: tuple[str, ...], smoke: Smoke) -> Item:
    artifact = Artifact(path=path, digest=digest.of(data), size=len(data), urls=urls)
    model = Model(
        name=name, version=version, tasks=(smoke.task,), runtime=_RUNTIME, artifacts=(artifact,), entrypoint=path, smoke=smoke,
        memory=16 << 20,
    )  # fmt: skip
    return Item(model=model, data=data)


def _gguf(shape: Shape) -> bytes:
    with tempfile.TemporaryDirectory(prefix="reconcile-demo-") as folder:
        path = Path(folder, "model.gguf")
        models.write(shape, path)
        return path.read_bytes()
