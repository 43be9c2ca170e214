"""
Ten thousand nodes in a simulation (simpy) that drives the real code: what polling, a first download, waves and bad models do to a fleet.

    python -m benchmarks.fleet_sim                                  # 10,000 nodes: about ten minutes
    python -m benchmarks.fleet_sim --nodes 1000
    python -m benchmarks.fleet_sim --only check                     # against the measured run of fleet_download.py alone

Real are: the signatures and their verification (``core.trust``) on each node and for each snapshot, the lock and what it asks of a node
(``core.lock``, ``core.rollout``), the plan (``core.plan``), the order of effects (``apply.run``, over the memory twins of the ports that
the tests use), when the agent wakes (``core.rollout.start_delay``, ``agent.loop.delay``), how a server is left alone
(``commands.retry_after``), and statuses, their verification and the verdict (``fleet``). Simulated are time, the bytes of models on links
that are shared evenly, caches, and how long a sync and a test job take. A node whose lock and state are those of a plan without changes is
not planned again, but one in a hundred: a plan is a function of both.

The figures at the top are measured: ``fleet_download.py`` (``fleet_measured.json``) and ``polling.py`` (RESULTS.md).
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import simpy
from msgspec import Struct

from benchmarks.fleet_download import Way
from reconciler.agent import loop
from reconciler.commands import node_trust, retry_after
from reconciler.core import digest, lock, rollout, trust, units
from reconciler.core.errors import FetchError
from reconciler.core.lock import Lock
from reconciler.core.node import Policy
from reconciler.fleet import assess, collect, outbox, statement
from reconciler.fleet.register import Register
from reconciler.fleet.statement import NodeReport, ReportedModel, ReportedSnapshot
from reconciler.settings import Agent
from tests.fleet import Member, enroll
from tests.network import Document, Key, Network
from tests.twins.fetch import Internet
from tests.twins.node import MemoryNode

MEASURED = Path(__file__).with_name("fleet_measured.json")
#: Measured by polling.py: bytes of a request and its answer beyond TLS, and seconds of the origin's processor.
POLL_BYTES, POLL_PROCESSOR_SECONDS = 366, 0.00090
#: Of the links' rate, what is left to bytes of bodies: 1,448 of the 1,500 of a packet.
PAYLOAD = 1448 / 1500
MODEL_BYTES = 64 << 20
TEST_SECONDS = 2.0
INTERVAL, JITTER = units.seconds(Agent().interval), units.seconds(Agent().jitter)
STARTED = datetime(2026, 12, 1, tzinfo=UTC)
STALE_SECONDS = 3 * 3600.0
RULE = assess.Rule(max_failed=0.01, min_nodes=50, after_seconds=2 * 3600.0)

Steps = Generator[Any, Any, None]
T = TypeVar("T")


# -- links and caches ------------------------------------------------------------------------------


class Link:
    """A link whose rate is shared evenly by all that is sent over it now."""

    def __init__(self, env: simpy.Environment, bytes_per_second: float) -> None:
        self._env, self.rate = env, bytes_per_second
        self._flows: list[tuple[float, int, Any]] = []
        self._numbers = itertools.count()
        self._each = self._at = 0.0
        self._epoch = 0
        self.sent = 0.0

    def send(self, size: float) -> Any:
        """Return the event that *size* bytes have arrived."""
        self._advance()
        done = self._env.event()
        heapq.heappush(self._flows, (self._each + size, next(self._numbers), done))
        self.sent += size
        self._plan_next()
        return done

    def _advance(self) -> None:
        if self._flows:
            self._each += (self._env.now - self._at) * self.rate / len(self._flows)
        self._at = self._env.now

    def _plan_next(self) -> None:
        self._epoch += 1
        if self._flows:
            left = (self._flows[0][0] - self._each) * len(self._flows) / self.rate
            self._env.process(self._end_next(max(left, 0.0), self._epoch))

    def _end_next(self, seconds: float, epoch: int) -> Steps:
        yield self._env.timeout(seconds)
        if epoch != self._epoch:  # another flow began or ended meanwhile
            return
        self._advance()
        while self._flows and self._flows[0][0] <= self._each + 1.0:
            heapq.heappop(self._flows)[2].succeed()
        self._plan_next()


class Site:
    """Nodes with a cache, or none, before the origin. The cache dies when *dies_at* of its first copy is in it; 0: it is down."""

    def __init__(self, env: simpy.Environment, origin: Link, *, cached: bool, local_rate: float = 1e9 / 8, dies_at: float = 1.0) -> None:
        self._env, self._origin, self._cached, self._dies_at = env, origin, cached and dies_at > 0, dies_at
        self._local = Link(env, local_rate * PAYLOAD)
        self._copies: dict[str, Any] = {}

    def fetch(self, blob: str, size: float) -> Steps:
        """Wait until *blob* has arrived at one more node."""
        if not self._cached:
            yield self._origin.send(size)
            return
        if blob not in self._copies:
            self._copies[blob] = self._origin.send(size * self._dies_at)
        yield self._copies[blob] & self._local.send(size * self._dies_at)
        if self._dies_at < 1.0:
            yield self._origin.send(size * (1 - self._dies_at))


# -- the check against the real run ----------------------------------------------------------------


def predicted(way: str, nodes: int, *, overhead: float, rate: float, cores: int) -> tuple[float, float]:
    """Return after how many seconds the last of *nodes* ends, and the copies that leave the origin; *overhead*: core seconds of a sync."""
    env = simpy.Environment()
    origin = Link(env, rate)
    site = Site(env, origin, cached=way in {"cache", "killed", "aria2"}, local_rate=40e9 / 8, dies_at=0.5 if way == "killed" else 1.0)
    processor = simpy.Resource(env, cores)
    busy = 0.0 if way == "aria2" else overhead / 2

    def node() -> Steps:
        for step in ("before", "after"):
            with processor.request() as held:
                yield held
                yield env.timeout(busy)
            if step == "before":
                yield from site.fetch("model", MODEL_BYTES)

    for _ in range(1 if way == "one" else nodes):
        env.process(node())
    env.run()
    return env.now, origin.sent / MODEL_BYTES


class Checked(Struct, frozen=True, kw_only=True):
    """A way as it is predicted and as it was measured."""

    name: str
    nodes: int
    seconds: float
    copies: float
    measured_seconds: float
    measured_copies: float

    @property
    def off(self) -> float:
        """By which part the prediction of the last node is off."""
        return self.seconds / self.measured_seconds - 1


def check(measured: Path, mbit: float, cores: int) -> list[Checked]:
    """Predict the run that *measured* is of, print it beside what was measured, and return it. Only ``one`` calibrates it."""
    ways = msgspec.json.decode(measured.read_bytes(), type=dict[str, Way])
    rate = mbit * 1e6 / 8 * PAYLOAD
    overhead = ways["one"].last - MODEL_BYTES / rate
    print(f"calibrated by one node: {overhead:.1f} s of a sync are no transfer, and need one of {cores} processors")
    print("| way | nodes | last node, predicted | measured | off | copies, predicted | measured |")
    found = []
    for name, way in ways.items():
        seconds, copies = predicted(name, way.nodes, overhead=overhead, rate=rate, cores=cores)
        one = Checked(
            name=name, nodes=way.nodes, seconds=seconds, copies=copies, measured_seconds=way.last, measured_copies=way.copies
        )  # fmt: skip
        found.append(one)
        print(f"| {name} | {way.nodes} | {seconds:.1f} s | {way.last:.1f} s | {100 * one.off:+.0f} % | {copies:.2f} | {way.copies:.2f} |")
    return found


# -- the network and its operator ------------------------------------------------------------------


class Facts:
    """A ledger of facts alone, as one node keeps them."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {}

    def fact(self, key: str, kind: type[T]) -> T | None:
        """Return the fact *key*, or None."""
        del kind
        return self._facts.get(key)

    def set_fact(self, key: str, value: object) -> None:
        """Store *value* as the fact *key*."""
        self._facts[key] = value


class World:
    """Time, the origin, and what the network signed."""

    def __init__(self, env: simpy.Environment, origin: Link) -> None:
        self.env, self.origin = env, origin
        self.network = Network("fleet")
        self.network.now = STARTED
        self.root = self.network.trusted()
        self.internet = Internet()
        self.author = MemoryNode()
        self.author.network, self.author.internet = self.network, self.internet
        self.models: dict[str, Document] = {}
        self.document, self.etag = b"", ""
        #: Requests by second, and those for newer roots.
        self.asked: Counter[int] = Counter()
        self.roots = 0
        self.down = False
        self.statuses: dict[str, bytes] = {}
        self.verdicts: dict[str, Callable[[str], bool]] = {}
        self.locks: dict[str, Lock] = {}
        self.tried: dict[str, set[str]] = {}

    def clock(self) -> datetime:
        """Return the instant."""
        return STARTED + timedelta(seconds=self.env.now)

    def add(self, name: str, **changes: Any) -> None:
        """List the model *name* from the next snapshot on."""
        self.models[name] = self.author.item(name, {"model.gguf": name.encode()}, **changes)

    def publish(self, **changes: Any) -> None:
        """Sign the next snapshot."""
        self.network.now = self.clock()
        self.document = self.network.snapshot(*self.models.values(), **changes)
        self.etag = digest.of(self.document)

    def get(self, etag: str, *, roots: bool) -> bytes | None:
        """Answer a node that has what *etag* names: a newer document, or None. Raises FetchError while the server is overloaded."""
        self.asked[int(self.env.now)] += 1 + roots
        self.roots += roots
        if self.down:
            error = FetchError("it answered 503")
            error.asked_seconds = 600.0
            raise error
        return None if etag == self.etag else self.document

    def compiled(self, verified: trust.Verified) -> Lock:
        """Return the lock of *verified*: the same for each node."""
        if verified.digest not in self.locks:
            self.locks[verified.digest] = lock.compile(verified)
        return self.locks[verified.digest]


@cache
def lock_digest(wanted: str) -> str:
    """Return a digest for the snapshot *wanted*."""
    return digest.of(wanted.encode())


# -- nodes -----------------------------------------------------------------------------------------


class SimNode:
    """One node: the agent's schedule, the real trust, lock, plan and apply, over twins."""

    def __init__(self, world: World, number: int, site: Site) -> None:
        self.id, self.world, self.site = f"node-{number:05d}", world, site
        self.key = Key(f"node/{self.id}")
        self.name = self.id
        self.memory = MemoryNode()
        self.memory.internet, self.memory.clock = world.internet, world.clock  # type: ignore[assignment]
        self.memory.policy = Policy()
        self.trust = trust.TrustState()
        self.facts: Any = Facts()
        self.etag = ""
        self.wanted: Lock | None = None
        self.roots_at = -node_trust.ROOTS_EVERY_SECONDS
        self.settled = self.dead = False
        self.said, self.due_at, self.sequence = "", 0.0, 0
        self._draw = random.Random(self.id)
        self.fetched = 0.0

    def run(self) -> Steps:
        """Live: the agent's loop."""
        env = self.world.env
        yield env.timeout(rollout.start_delay(self.id, min(INTERVAL, loop.START_SECONDS)))
        while not self.dead:
            yield from self._cycle()
            yield env.timeout(loop.delay(INTERVAL, 0) + self._draw.uniform(0.0, min(INTERVAL, JITTER)))

    def _cycle(self) -> Steps:
        self._poll()
        if self.wanted is None or (self.settled and self._draw.random() > 0.01):
            self._report()
            return
        plan = self.memory.plan(self.wanted)
        arriving = [change for change in plan.blobs if change.op == "fetch"]
        for change in arriving:
            yield from self.site.fetch(change.digest, MODEL_BYTES)
            self.fetched += MODEL_BYTES
        tested = [change.id for change in plan.models if change.op in {"install", "retest", "repair"}]
        if tested:
            yield self.world.env.timeout(TEST_SECONDS)
        for model in tested:
            self.world.tried.setdefault(model, set()).add(self.id)
            if (bad := self.world.verdicts.get(model)) and bad(self.id):
                self.memory.tester.verdicts[model] = ("bad", "it gave no token")
        if plan.changes:
            self.memory.run(self.wanted)
            self.memory.heard.events.clear()
        self.settled = not plan.changes
        self._report()

    def _poll(self) -> None:
        """Ask for the snapshot, and for newer roots once an hour; verify what is new."""
        now, address = self.world.clock(), "https://config.example.org/snapshot.json"
        roots = self.world.env.now - self.roots_at >= node_trust.ROOTS_EVERY_SECONDS
        try:
            retry_after.check(address, self.facts, now)
            with retry_after.remembered(address, self.facts, now):
                self.roots_at = self.world.env.now if roots else self.roots_at
                document = self.world.get(self.etag, roots=roots)
        except FetchError:
            return
        if document is None:
            return
        verified = trust.verify(document, self.world.root, now=now, trust_state=self.trust)
        self.trust = trust.advance_state(self.trust, verified)
        self.wanted = rollout.for_node(self.world.compiled(verified), self.id, ())
        self.etag, self.settled = self.world.etag, False

    def _report(self) -> None:
        """Sign a status where it says something new, and once an hour."""
        if self.wanted is None or self.dead:
            return
        active, records = self.memory.generations.active, self.memory.ledger.records
        models = tuple(
            ReportedModel(
                id=one.id,
                state=record.state if (record := records.get(one.id)) else "absent",
                reason=(record.reason if record else "not-installed").partition(":")[0],
                tree=active.tree_of(one.id),
                since=record.since if record else None,
                detail=record.last_error if record and record.state == "failed" else "",
            )
            for one in self.wanted.model
        )
        content = digest.of(msgspec.json.encode((models, self.trust.version, active.digest)))
        if content == self.said and self.world.env.now < self.due_at:
            return
        self.said, self.sequence = content, self.sequence + 1
        self.due_at = self.world.env.now + outbox.EVERY_SECONDS * (1 - outbox.EARLIER * self._draw.random())
        report = NodeReport(
            schema=1, network="fleet", node=self.id, key=self.key.pem, sequence=self.sequence, at=self.world.clock(), program="sim",
            snapshot=ReportedSnapshot(version=self.trust.version, digest=self.trust.digest), lock=lock_digest(self.trust.digest),
            generation=active.number, active_digest=active.digest, models=models,
        )  # fmt: skip
        self.world.statuses[self.id] = statement.sign(report, self.key.private)


def one_in_twenty(node: str) -> bool:
    """Return whether *node* is one of those on which a model fails that fails on few."""
    return int(digest.of(node.encode())[-4:], 16) % 20 == 0


# -- what is shown ---------------------------------------------------------------------------------


class Wave(Struct, frozen=True, kw_only=True):
    """How one wave went: nodes that tried the model, the verdict and after how long, and what half an hour later."""

    what: str
    tried: int
    word: str
    seconds: float
    #: Nodes that live, those of them that serve what they should, and downloads that this took.
    alive: int
    right: int
    downloads: float


class Operator:
    """The network's operator: waves, reports by the real code, and the rule."""

    def __init__(self, world: World, nodes: list[SimNode], folder: Path, every: float) -> None:
        self.world, self.nodes, self.every = world, nodes, every
        self.waves: list[Wave] = []
        self._register = Register(folder / "node-keys")
        enroll(folder / "node-keys", *(Member(node.id) for node in nodes))

    def verdict(self, model: str) -> assess.FleetReport:
        """Return the report about *model*, made of every status."""
        given = [(name, lambda data=data: data) for name, data in self.world.statuses.items()]
        found = collect.collect(given, self._register, now=self.world.clock(), stale_seconds=STALE_SECONDS)
        self._register.remember(found.seen)
        return assess.assess(found, now=self.world.clock(), rule=RULE, judged=(model,))

    def wave(self, old: str, new: str, name: str, what: str, bad: Callable[[str], bool] | None = None, *, kills: bool = False) -> Steps:
        """Open *new*, which replaces *old*, to one node in a hundred; widen it to all or take it back, as the rule says."""
        env, world = self.world.env, self.world
        if bad and not kills:
            world.verdicts[new] = bad
        world.models[old] = world.models[old] | {"state": "retired"}
        world.add(new, replaces=[old])
        place: dict[str, Any] = {name: {"models": [new], "per_10000": max(100, min(10_000, 1_000_000 // len(self.nodes)))}}
        world.publish(rollouts=place)
        began, ended, word, why = env.now, 0.0, "not-yet", ""
        while word == "not-yet" and env.now - began < 24 * 3600:
            yield env.timeout(self.every)
            if kills:
                self._kill(new)
            report = self.verdict(new)
            assert report.verdict
            word, why = report.verdict.word, report.verdict.reasons[0]
        ended = env.now
        exposed, serving = len(world.tried.get(new, ())), sum(new in node.memory.generations.active.entries for node in self.nodes)
        print(f"| {what} | {exposed} | {serving} | {word} | {units.human_time(env.now - began)} | {why} |", flush=True)
        before = sum(node.fetched for node in self.nodes)
        place[name]["per_10000"] = 10_000 if word == "safe" else 0
        world.publish(rollouts=place)
        yield env.timeout(1800.0)
        alive = [node for node in self.nodes if not node.dead]
        after = sum((new if word == "safe" else old) in node.memory.generations.active.entries for node in alive)
        fetched = (sum(node.fetched for node in self.nodes) - before) / MODEL_BYTES
        print(
            f"  half an hour later: {after:,} of {len(alive):,} nodes serve {new if word == 'safe' else old}, {fetched:,.0f} downloads",
            flush=True,
        )
        self.waves.append(Wave(
            what=what, tried=exposed, word=word, seconds=ended - began, alive=len(alive), right=after, downloads=fetched
        ))  # fmt: skip
        if word != "safe":
            del world.models[new]
            world.models[old] = world.models[old] | {"state": "enabled"}

    def _kill(self, model: str) -> None:
        for node in self.nodes:
            node.dead = node.dead or model in node.memory.generations.active.entries


def polling(world: World, first: float, last: float, name: str, nodes: int) -> None:
    """Print what was asked between two instants."""
    counts = [world.asked[second] for second in range(int(first), int(last))]
    mean = sum(counts) / max(len(counts), 1)
    busy = 100 * mean * POLL_PROCESSOR_SECONDS
    day = mean * POLL_BYTES * 86400 / 1e9
    print(f"| {name} | {nodes:,} | {mean:.1f} | {max(counts, default=0)} | {day:.2f} GB | {busy:.1f} % |", flush=True)


def fleet(count: int, sites: int, dead_caches: int, mbit: float, folder: Path) -> list[Wave]:
    """Simulate *count* nodes at *sites* sites, print what happens to them, and return how the waves went."""
    env = simpy.Environment()
    origin = Link(env, mbit * 1e6 / 8 * PAYLOAD)
    world = World(env, origin)
    places = [Site(env, origin, cached=True, dies_at=0.0 if number < dead_caches else 1.0) for number in range(sites)]
    nodes = [SimNode(world, number, places[number % sites]) for number in range(count)]
    operator = Operator(world, nodes, folder, every=1800.0)
    world.add("llm:v1")
    world.publish()

    def story() -> Steps:
        served: list[float] = []
        for node in nodes:
            env.process(node.run())
        while len(served) < count:
            yield env.timeout(10.0)
            served = [env.now for node in nodes if node.memory.generations.active.entries]
        print("### A first model, all nodes started at once\n")
        copies = origin.sent / MODEL_BYTES
        print(f"{count:,} nodes at {sites} sites with a cache each, {dead_caches} of them down; the origin has {mbit:,.0f} Mbit/s")
        print(f"every node serves it after {units.human_time(env.now)}; {copies:,.0f} copies left the origin, {count:,} without caches\n")
        print("### Polling\n")
        print("| when | nodes | requests a second | the most in one | bytes a day | of one core |")
        polling(world, 0, 300, "the first five minutes, started at once", count)
        yield env.timeout(7200.0 - env.now)
        polling(world, 3600, 7200, "an hour without news", count)
        world.down = True
        yield env.timeout(3600.0)
        polling(world, 7200, 10800, "an hour of 503 with Retry-After: 600", count)
        world.down = False
        yield env.timeout(1800.0)
        polling(world, 10800, 12600, "half an hour after it", count)
        print("\n### Waves: 1 % first\n")
        print("| the model | nodes that tried it | that serve it | verdict | after | why |")
        yield from operator.wave("llm:v1", "llm:v2", "good", "a good one")
        yield from operator.wave("llm:v2", "llm:v3", "fails", "fails its test on every node", lambda _: True)
        yield from operator.wave(
            "llm:v2", "llm:v4", "some", "fails on one node in twenty", lambda node: int(digest.of(node.encode())[-4:], 16) % 20 == 0
        )
        yield from operator.wave("llm:v2", "llm:v5", "kills", "passes, and ends the machine", kills=True)

    env.run(until=env.process(story()))
    return operator.waves


def main() -> None:
    """Check the simulation against the measured run, then simulate the fleet; print tables for RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--dead-caches", type=int, default=5)
    parser.add_argument("--mbit", type=float, default=1000.0, help="the origin's")
    parser.add_argument("--measured", type=Path, default=MEASURED)
    parser.add_argument("--measured-mbit", type=float, default=40.0)
    parser.add_argument("--cores", type=int, default=2, help="of the machine that fleet_download.py ran on")
    parser.add_argument("--only", choices=["check", "fleet"])
    asked = parser.parse_args()
    if asked.only != "fleet":
        print("### Predicted and measured\n")
        check(asked.measured, asked.measured_mbit, asked.cores)
        print()
    if asked.only != "check":
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fleet-sim-") as folder:
            fleet(asked.nodes, asked.sites, asked.dead_caches, asked.mbit, Path(folder))
        print(f"\nsimulated in {units.human_time(time.monotonic() - began)}")


if __name__ == "__main__":
    main()
