"""One suite for generations on a disk and their memory twin."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.core.errors import StoreError
from reconciler.core.snapshot import Runtime
from reconciler.core.state import ActiveModel, Generation
from reconciler.ports import Generations as Port
from reconciler.store import atomic
from reconciler.store.generations import Generations, path_of
from reconciler.store.layout import Layout
from tests.twins.content import name_of
from tests.twins.store import MemoryGenerations


def entry(model: str, tree: bytes = b"tree") -> ActiveModel:
    runtime = Runtime(engine="llama-cpp")
    return ActiveModel(id=model, tasks=("completion",), runtime=runtime, path=path_of(model), entrypoint="m", bytes=3, tree=name_of(tree))


@pytest.fixture(params=["memory", "disk"])
def port(request: pytest.FixtureRequest, tmp_path: Path) -> Port:
    if request.param == "memory":
        return MemoryGenerations()
    layout = Layout(tmp_path, tmp_path / "cold")
    atomic.make_folder(layout.generations)
    return Generations(layout)


def test_a_new_store_serves_nothing(port: Port) -> None:
    assert port.current() == Generation()


def test_what_is_swapped_in_is_what_serves(port: Port) -> None:
    made = port.swap({"b:v1": entry("b:v1"), "a:v1": entry("a:v1")})

    assert made.number == 1
    assert list(made.entries) == ["a:v1", "b:v1"]
    assert port.current() == made


def test_every_swap_is_a_new_number(port: Port) -> None:
    numbers = [port.swap({"a:v1": entry("a:v1", str(index).encode())}).number for index in range(4)]

    assert numbers == [1, 2, 3, 4]


def test_an_empty_set_is_a_generation_too(port: Port) -> None:
    port.swap({"a:v1": entry("a:v1")})

    assert port.swap({}).number == 2
    assert port.current().entries == {}


def test_an_earlier_generation_comes_back_as_it_was(port: Port) -> None:
    first = port.swap({"a:v1": entry("a:v1")})
    port.swap({"b:v1": entry("b:v1")})

    assert port.reactivate(1) == first
    assert port.current() == first
    assert port.swap({}).number == 3


def test_a_generation_that_never_was_is_refused_and_changes_nothing(port: Port) -> None:
    made = port.swap({"a:v1": entry("a:v1")})

    with pytest.raises(StoreError):
        port.reactivate(7)

    assert port.current() == made
