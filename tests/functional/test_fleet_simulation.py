"""The simulation of a fleet (``benchmarks/fleet_sim.py``): its links, what it predicts of a measured run, and the life of a small fleet."""

from __future__ import annotations

from pathlib import Path

import pytest
import simpy

from benchmarks import fleet_sim
from benchmarks.fleet_sim import Link, Site

pytestmark = pytest.mark.slow


def test_a_link_is_shared_evenly_by_what_is_sent_over_it() -> None:
    env = simpy.Environment()
    link, arrived = Link(env, 100.0), {}

    def send(name: str, at: float, size: float) -> fleet_sim.Steps:
        yield env.timeout(at)
        yield link.send(size)
        arrived[name] = env.now

    env.process(send("long", 0, 1000))
    env.process(send("short", 5, 100))  # half of the rate, for two seconds
    env.run()
    assert arrived == pytest.approx({"short": 7, "long": 11}, abs=0.1)


@pytest.mark.parametrize(("cached", "dies_at", "copies"), [(True, 1.0, 1), (False, 1.0, 4), (True, 0.0, 4), (True, 0.5, 2.5)])
def test_a_cache_takes_one_copy_and_a_dead_one_none(cached: bool, dies_at: float, copies: float) -> None:
    env = simpy.Environment()
    origin = Link(env, 1e6)
    site = Site(env, origin, cached=cached, dies_at=dies_at)
    for _ in range(4):
        env.process(site.fetch("blob", 1e6))
    env.run()
    assert origin.sent == copies * 1e6
    assert env.now == pytest.approx(copies, abs=0.1)


def test_sixteen_nodes_are_predicted_within_a_fifth_of_what_was_measured() -> None:
    found = {one.name: one for one in fleet_sim.check(fleet_sim.MEASURED, 40.0, 2)}
    assert set(found) == {"one", "cache", "killed", "aria2", "plain"}
    assert all(abs(one.off) < 0.2 for one in found.values()), found


def test_a_small_fleet_goes_through_waves_and_each_verdict_is_right(tmp_path: Path) -> None:
    good, fails, some, kills = fleet_sim.fleet(200, 4, 1, 1000.0, tmp_path)
    assert (good.word, fails.word, some.word, kills.word) == ("safe", "unsafe", "unsafe", "unsafe")
    assert all(wave.right == wave.alive for wave in (good, fails, some, kills))
    assert [wave.downloads for wave in (fails, some, kills)] == [0, 0, 0], "what is taken back comes from what is here"
    assert good.downloads == 200 - good.tried
    assert kills.alive < 200
