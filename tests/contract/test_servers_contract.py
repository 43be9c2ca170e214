"""One suite for servers that follow the active set and their memory twin."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from reconciler.core.state import Generation
from reconciler.ports import Servers
from reconciler.serve.content import Server
from reconciler.serve.follow import ServerFollower
from reconciler.store import atomic
from reconciler.store.generations import Generations
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger
from tests.contract.test_generations_contract import entry
from tests.node import deaf
from tests.twins.testing import MemoryServers

ONE = Generation(number=1, entries={"a:v1": entry("a:v1")})
TWO = Generation(number=2, entries={"a:v1": entry("a:v1"), "b:v1": entry("b:v1")})


@pytest.fixture(params=["memory", "real"])
def port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Servers]:
    if request.param == "memory":
        yield MemoryServers()
        return
    layout = Layout(tmp_path, tmp_path / "cold")
    atomic.make_folder(layout.generations)
    for generation in (ONE, TWO):
        Generations(layout).swap(generation.entries)
    told = Server(name="main", kind="command", reload=(sys.executable, "-c", "pass"))
    with Ledger.writing(layout.ledger) as ledger:
        yield ServerFollower(layout, (told,), ledger, report=deaf, now=lambda: datetime.now(UTC))


def test_every_server_is_told_and_has_what_it_was_told_of(port: Servers) -> None:
    for generation in (ONE, TWO, ONE):
        (state,) = port.follow(generation)
        assert (state.name, state.kind, state.generation, state.error) == ("main", "command", generation.number, "")


def test_a_server_that_has_it_already_has_it_still(port: Servers) -> None:
    assert port.follow(ONE) == port.follow(ONE)
