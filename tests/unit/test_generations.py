"""Generations on a disk: synced before they are named, named before they serve, and told apart from a disk that refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from reconciler.core.errors import StoreError
from reconciler.core.snapshot import Runtime
from reconciler.core.state import ActiveModel, Generation
from reconciler.store import atomic, generations
from reconciler.store.generations import DamagedGeneration, Generations, path_of
from reconciler.store.layout import Layout
from tests.calls import noting
from tests.twins.content import name_of


def entry(model: str) -> ActiveModel:
    runtime, tree = Runtime(engine="llama-cpp"), name_of(b"tree")
    return ActiveModel(id=model, tasks=("completion",), runtime=runtime, path=path_of(model), entrypoint="m", bytes=3, tree=tree)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path, tmp_path / "cold")
    atomic.make_folder(layout.generations)
    (layout.tree(name_of(b"tree"))).mkdir(parents=True)
    return layout


def test_a_generation_is_synced_before_its_name_and_named_before_it_serves(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("new_symlink", "write", "sync_tree", "rename", "symlink"):
        real = getattr(atomic, name)
        monkeypatch.setattr(atomic, name, noting(done, name, real))

    Generations(layout).swap({"a:v1": entry("a:v1")})

    assert done == ["new_symlink", "write", "sync_tree", "rename", "symlink"]


def test_links_are_relative_and_lead_to_the_tree(layout: Layout) -> None:
    Generations(layout).swap({"a:v1": entry("a:v1")})

    assert str(layout.active.readlink()) == "generations/1"
    assert not (layout.active / "models/a/v1").readlink().is_absolute()
    assert (layout.active / "models/a/v1").samefile(layout.tree(name_of(b"tree")))
    assert generations.misdirected(layout, generations.current(layout)) == ()


@pytest.mark.parametrize("at", ["write", "sync_tree", "rename", "symlink"])
def test_a_swap_that_fails_leaves_the_old_set(layout: Layout, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    port = Generations(layout)
    before = port.swap({"a:v1": entry("a:v1")})

    def refuse(*_: object) -> None:
        raise StoreError("no")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, at, refuse)
        with pytest.raises(StoreError):
            port.swap({"b:v1": entry("b:v1")})

    assert port.current() == before
    assert [path.name for path in layout.generations.iterdir() if path.name.startswith(".")] == []
    assert port.swap({"c:v1": entry("c:v1")}).entries.keys() == {"c:v1"}


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("call", ["readlink", "open"])
def test_a_disk_that_refuses_is_not_an_empty_set(layout: Layout, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    Generations(layout).swap({"a:v1": entry("a:v1")})

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)

    with pytest.raises(StoreError) as refused:
        Generations(layout).current()
    assert not isinstance(refused.value, DamagedGeneration)


def test_a_damaged_generation_is_as_good_as_none(layout: Layout) -> None:
    Generations(layout).swap({"a:v1": entry("a:v1")})
    (layout.active / "index.json").unlink()

    assert Generations(layout).current() == Generation()
    with pytest.raises(DamagedGeneration):
        generations.current(layout)
    with pytest.raises(DamagedGeneration):
        generations.read(layout, 7)
