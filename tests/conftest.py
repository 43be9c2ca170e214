"""Fixtures that more than one room of tests needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.demo.server import Server, serving
from tests.node import Node, tiny

os.umask(0o022)  # with 002, the folders that tests make could be changed by a group, and the settings in them would be refused


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: tests wait for a disk or for a server that keeps them waiting. More of them gain nothing."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.fixture
def server() -> Iterator[Server]:
    """A real HTTP server on this machine."""
    with serving() as running:
        yield running


@pytest.fixture
def node(tmp_path: Path, server: Server) -> Node:
    """A node with its own network and store."""
    return Node(tmp_path / "node", server)


@pytest.fixture
def used(node: Node) -> Node:
    """A node that serves one model."""
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    return node
