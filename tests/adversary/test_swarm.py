"""
A swarm with real programs in network namespaces: what comes from peers is verified, HTTP finishes what they do not, the fence holds.

In each attack the model becomes active with the very bytes that were signed, and the store holds nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import swarm
from tests.node import run, tiny
from tests.swarm import Site, SwarmNode

pytestmark = [pytest.mark.slow, swarm.needed()]

CHILD = str(Path(__file__).resolve().parents[1] / "children" / "swarm_peers.py")
DATA = tiny("swarm", width=512)
#: HTTP takes over soon.
HASTY = 'slow_after = "3s"\nmin_rate = "64KiB"\n'


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, into which no other user may look
        os.chmod(folder, 0o755)  # noqa: PTH101
        with swarm.site(Path(folder), DATA) as made:
            yield made


def incidents(node: SwarmNode) -> list[dict[str, str]]:
    found: list[dict[str, str]] = run("incidents", "--config", str(node.folder / "reconcile.toml"), "--json").json
    return found


def over_http(site: Site) -> bool:
    """Whether nginx sent the file; a request that is broken off counts what was on its way too."""
    return site.sent() >= len(DATA)


def active_digest(node: SwarmNode) -> str:
    return str(run("status", "--config", str(node.folder / "reconcile.toml"), "--json").json["active_digest"])


def is_good(node: SwarmNode) -> bool:
    ran = node.sync()
    assert ran.code == 0, ran
    return node.holds()


def test_nodes_get_a_model_from_the_seeder_and_then_from_each_other(site: Site) -> None:
    first, second, third = (site.node(number) for number in (1, 2, 3))
    with site.tracker(), site.http(), first.daemon(), second.daemon():
        with site.seeder():
            assert is_good(first)
            assert is_good(second)
        with third.daemon():
            assert is_good(third)  # the seeder is gone: what it gets, it gets from stores
        assert site.sent() == 0
        mode = first.blob().stat()
        assert (mode.st_uid, oct(mode.st_mode & 0o777)) == (os.geteuid(), "0o444")
        assert sorted(path.name for path in first.blob().parent.iterdir()) == [first.blob().name]
        assert not any((first.swarm_folder / "incoming").iterdir())  # its place there is free again


def test_after_a_new_start_of_its_process_a_node_seeds_again_with_its_next_run(site: Site) -> None:
    first, second = site.node(1), site.node(2)
    with site.tracker(), site.http():
        with site.seeder(), first.daemon():
            assert is_good(first)
        with first.daemon(), second.daemon():
            assert is_good(first)  # nothing to do
            assert is_good(second)
        assert site.sent() == 0


def test_nodes_with_and_without_peers_hold_the_same_set(site: Site) -> None:
    with_peers, without = site.node(1), site.node(2)
    without.change("enabled = true", "enabled = false")
    with site.tracker(), site.http(), site.seeder(), with_peers.daemon():
        assert is_good(with_peers)
        assert site.sent() == 0
        assert is_good(without)
        assert over_http(site)
    assert active_digest(with_peers) == active_digest(without)


def test_a_tracker_serves_no_torrent_that_is_not_on_the_whitelist(site: Site) -> None:
    node = site.node(1, HASTY)
    with site.tracker(listed=False), site.http(), site.seeder(), node.daemon():
        assert is_good(node)
        assert over_http(site)


def test_a_lying_peer_alone_brings_nothing_in_and_http_finishes(site: Site) -> None:
    node = site.node(1, HASTY)
    with site.tracker(), site.http(), site.liar("45.66.0.99") as liar, node.daemon(), node.syncing() as syncing:
        swarm.until(lambda: "6881" in liar.run("ss", "-tn", "state", "established").stdout, "the node asks the liar")
        assert syncing.wait(timeout=swarm.PATIENCE) == 0
        assert node.holds()
        assert over_http(site)


def test_a_lying_peer_beside_an_honest_one_is_outlived(site: Site) -> None:
    node = site.node(1, 'slow_after = "60s"\n')
    with site.tracker(), site.http(), site.liar("45.66.0.99"), site.seeder(), node.daemon():
        assert is_good(node)
        assert site.sent() == 0


def test_a_signed_torrent_of_other_bytes_is_noticed_by_the_digest_and_http_finishes(site: Site) -> None:
    """Whoever makes torrents is not the one whose bytes count, and SHA-1 decides nothing."""
    site.torrent_bytes = bytes(byte ^ 0xFF for byte in DATA)
    node = site.node(1, 'slow_after = "30s"\n')  # long enough for the first peer to be found: its bytes are what this is about
    with site.tracker(), site.http(), site.liar("45.66.0.99"), node.daemon():
        assert is_good(node)
        assert over_http(site)
    (wrong,) = [one for one in incidents(node) if one["kind"] == "hash-mismatch"]
    assert wrong["source"] == "peers"


def test_a_dead_tracker_costs_a_moment_and_http_finishes(site: Site) -> None:
    node = site.node(1, HASTY)
    with site.http(), site.seeder(), node.daemon():
        assert is_good(node)
        assert over_http(site)


def test_without_the_swarms_process_http_does_it_all(site: Site) -> None:
    node = site.node(1)
    with site.tracker(), site.http(), site.seeder():
        assert is_good(node)
        assert over_http(site)


def test_near_the_disk_reserve_peers_are_not_asked(site: Site) -> None:
    node = site.node(1, 'slow_after = "20s"\n')
    node.change('folder = "swarm"\nreserve = "1MiB"', 'folder = "swarm"\nreserve = "900TiB"')
    with site.tracker(), site.http(), site.seeder(), node.daemon():
        assert is_good(node)
        assert over_http(site)


@contextlib.contextmanager
def false_tracker(site: Site, node: SwarmNode, seen: Path) -> Iterator[None]:
    """Run a tracker that names this machine and a private network, where something listens and writes to *seen* who comes."""
    private = site.space("45.66.0.98")
    private.run("ip", "address", "add", "10.0.0.5/8", "dev", "eth0")
    node.space.run("ip", "route", "add", "10.0.0.0/8", "dev", "eth0")
    private.run("ip", "route", "add", "45.66.0.0/24", "dev", "eth0", check=False)
    private.run("ip", "address", "add", "fd00::5/64", "dev", "eth0", "nodad")
    node.space.run("ip", "address", "add", "fd00::10/64", "dev", "eth0", "nodad")
    log = site.folder / "children.log"
    here, there = ["127.0.0.1:7777", "127.6.8.9:7777", "[::1]:7777"], ["10.0.0.5:7777", "[fd00::5]:7777"]
    tracker = [sys.executable, CHILD, "tracker", swarm.TRACKER, str(swarm.TRACKER_PORT), *here, *there, "[::ffff:127.7.7.7]:7777"]
    with (
        site.tracker_space.running(*tracker, log=log),
        node.space.running(sys.executable, CHILD, "listen", str(seen), *here, "127.7.7.7:7777", log=log),
        private.running(sys.executable, CHILD, "listen", str(seen), *there, log=log),
    ):
        swarm.until(lambda: "7777" in node.space.run("ss", "-ltn").stdout, "a listener")
        swarm.until(lambda: "7777" in private.run("ss", "-ltn").stdout, "a listener")
        yield


@pytest.mark.parametrize("fenced", [False, True])
def test_a_tracker_that_names_this_machine_and_private_networks_is_held_by_the_fence(site: Site, *, fenced: bool) -> None:
    """aria2 connects to whatever a tracker names: without the fence the attack works, which shows that the fence is what holds."""
    node, seen = site.node(1, 'slow_after = "6s"\nmin_rate = "64KiB"\n', fenced=fenced), site.folder / "seen"
    seen.touch()
    with false_tracker(site, node, seen), site.http(), node.daemon():
        assert is_good(node)
        assert over_http(site)
    reached = {line.split()[0] for line in seen.read_text().splitlines()}
    named = {"127.0.0.1:7777", "127.6.8.9:7777", "[::1]:7777", "10.0.0.5:7777", "[fd00::5]:7777", "127.7.7.7:7777"}
    assert reached == (set() if fenced else named)


def test_slow_peers_are_left_and_http_goes_on_from_their_pieces(site: Site) -> None:
    node = site.node(1, 'slow_after = "12s"\nmin_rate = "40MiB"\n')  # a busy machine takes seconds to find its first peer
    with site.tracker(), site.http(), site.seeder(limit="256KiB"), node.daemon():
        ran = node.sync()
    assert ran.code == 0, ran
    assert node.holds()
    assert [one for one in ran.events if one["type"] == "fetch-progress" and one.get("resumed") and one["source"] != "peers"], ran.out


def test_a_node_alone_turns_to_http_from_its_pieces_and_gives_them_to_the_next_meanwhile(site: Site) -> None:
    alone, later = site.node(1), site.node(2)
    alone.change('alone_after = "1h"', 'alone_after = "8s"')
    with site.tracker(), site.http(rate="256k"), site.seeder(limit="192KiB"), alone.daemon(), later.daemon():
        with alone.syncing() as syncing:
            swarm.until(lambda: over_http_now(alone), "HTTP takes over")
            with later.syncing():
                met = f"{later.space.address}:"
                swarm.until(lambda: met in alone.space.run("ss", "-tn", "state", "established").stdout, "the later node meets the first")
                assert syncing.poll() is None
            assert syncing.wait(timeout=2 * swarm.PATIENCE) == 0, (alone.folder / "sync.out").read_text()
        assert alone.holds()
    said = (alone.folder / "sync.out").read_text()
    assert "no other node fetches it now" in said
    assert [one for one in map(json.loads, said.splitlines()) if one.get("resumed") and one["source"] != "peers"], said


def over_http_now(node: SwarmNode) -> bool:
    """Whether its run has begun to fetch over HTTP."""
    return f"{swarm.ORIGIN}:{swarm.HTTP_PORT}" in node.space.run("ss", "-tn", "state", "established").stdout


def test_nodes_that_fetch_at_once_are_not_alone(site: Site) -> None:
    nodes = [site.node(number) for number in (1, 2)]
    with site.tracker(), site.http(), site.seeder(limit="256KiB"), contextlib.ExitStack() as stack:
        for node in nodes:
            node.change('alone_after = "1h"', 'alone_after = "4s"')
            stack.enter_context(node.daemon())
            stack.enter_context(node.syncing())
        # A node alone would have turned to HTTP long before it had so much from this seeder.
        swarm.until(lambda: all(node.arrived() > 2 << 20 for node in nodes), "both have a good part of it")
        assert site.sent() == 0


@pytest.mark.parametrize("again", [False, True])
def test_aria2_killed_in_the_middle_costs_no_model(site: Site, *, again: bool) -> None:
    node = site.node(1, 'slow_after = "8s"\nmin_rate = "64KiB"\n')
    with site.tracker(), site.http(), site.seeder(limit="1MiB"), contextlib.ExitStack() as stack:
        daemon = stack.enter_context(node.daemon())
        syncing = stack.enter_context(node.syncing())
        swarm.until(lambda: node.arrived() > 1 << 20, "some pieces")
        daemon.send_signal(signal.SIGKILL)
        daemon.wait(timeout=swarm.PATIENCE)
        if again:
            stack.enter_context(node.daemon())
        assert syncing.wait(timeout=2 * swarm.PATIENCE) == 0, (node.folder / "sync.out").read_text()
        assert node.holds()
        assert (site.sent() == 0) == again


def test_a_run_that_is_killed_in_the_middle_is_finished_by_the_next_from_its_pieces(site: Site) -> None:
    node = site.node(1)
    with site.tracker(), site.http(), site.seeder(limit="1MiB"), node.daemon():
        with node.syncing() as syncing:
            swarm.until(lambda: node.arrived() > 1 << 20, "some pieces")
            folder = (node.swarm_folder / "incoming" / site.digits).stat()
            # The node's user, of the swarm's group, must be able to delete in it.
            assert (folder.st_gid, folder.st_mode & 0o2070) == (swarm.USER, 0o2070)
            assert (node.swarm_folder / "incoming" / site.digits / site.digits).stat().st_mode & 0o047 == 0o040
            syncing.send_signal(signal.SIGKILL)
            syncing.wait(timeout=swarm.PATIENCE)
        assert is_good(node)
        assert site.sent() == 0
