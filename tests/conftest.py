"""Fixtures that more than one room of tests needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.demo.server import Server, serving
from tests.node import Node, Prototype, tiny

os.umask(0o022)  # with 002, the folders that tests make could be changed by a group, and the settings in them would be refused


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: tests wait for a disk or for a server that keeps them waiting. More of them gain nothing."""
    return len(os.sched_getaffinity(0)) + 1


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
