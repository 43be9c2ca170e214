"""Fixtures that more than one room of tests needs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.demo.server import Server, serving
from tests.node import Node, Prototype, tiny

os.umask(0o022)  # with 002, the folders that tests make could be changed by a group, and the settings in them would be refused


#: Where tests take seconds each, or wait for as long.
_FUNCTIONAL = ("agent_process", "ci_templates", "failure_table", "fleet_simulation", "real_models", "secrets_during", "signals")
_LONG = (
    *(f"tests/adversary/test_{name}" for name in ("aria2_faults", "fetch_hostile", "fetch_ranges", "swarm")),
    "tests/crash/",
    *(f"tests/functional/test_{name}" for name in _FUNCTIONAL),
    "tests/laws/",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two workers for each core: tests wait for a disk, for a child, or for a server that keeps them waiting."""
    return 2 * len(os.sched_getaffinity(0))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """
    Let each worker begin with its share of the long tests: what is left at the end is short, and whoever is idle can take it over.

    Each worker begins at another place of its share: some of these tests wait, as those with peers do, and some compute, as the laws do.
    """
    workers: int = getattr(config, "workerinput", {}).get("workercount", 1)
    long = [item for item in items if item.nodeid.startswith(_LONG)]
    short = [item for item in items if not item.nodeid.startswith(_LONG)]
    begun = 0
    items.clear()
    for worker in range(workers):
        share = long[worker::workers]
        ended = len(short) if worker == workers - 1 else begun + max(0, (len(long) + len(short)) // workers - len(share))
        first = len(share) * worker // workers
        items += [*share[first:], *share[:first], *short[begun:ended]]
        begun = ended


def pytest_collection_finish() -> None:
    """Look for cycles less often, and not among the thousands of tests themselves: it took a twelfth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def running_server() -> Iterator[Server]:
    """A real HTTP server on this machine, for one test after the other."""
    with serving() as running:
        yield running


@pytest.fixture
def server(running_server: Server) -> Server:
    """A real HTTP server on this machine, which has nothing yet and tells the truth."""
    running_server.files.clear()
    running_server.lies.clear()
    return running_server


@pytest.fixture
def node(tmp_path: Path, server: Server) -> Node:
    """A node with its own network and store."""
    return Node(tmp_path / "node", server)


@pytest.fixture(scope="session")
def prototype(running_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Prototype:
    """A node that serves one model, to be copied."""
    return Prototype(tmp_path_factory.mktemp("prototype"), running_server, a=tiny("a"))


@pytest.fixture
def used(node: Node, prototype: Prototype) -> Node:
    """A node that serves one model."""
    prototype.copy_to(node)
    return node
