"""What holds of every plan, whatever the lock and the store: drawn at random, over twins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.core import lifecycle, plan
from reconciler.core.lifecycle import DESIRED, OBSERVED
from reconciler.core.lock import Lock, LockedModel
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.snapshot import Runtime
from reconciler.core.state import ActiveModel, BlobSeen, Generation, ModelState, NodeState, Passed, Record, TreeSeen
from reconciler.store.generations import path_of
from tests.network import Network
from tests.twins.content import changed, name_of
from tests.twins.fetch import Internet
from tests.twins.node import FACTS, SnapshotAuthor

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
IDS = ("a:v1", "a:v2", "b:v1", "c:v1")
CONTENTS = ({"m": b"one"}, {"m": b"two", "n": b"shared"}, {"m": b"three", "n": b"shared"})
NAMES = tuple(sorted({name_of(data) for files in CONTENTS for data in files.values()}))


@st.composite
def locks(draw: st.DrawFn) -> Lock:
    word = SnapshotAuthor(Network(), Internet())
    chosen = draw(st.lists(st.sampled_from(IDS), unique=True))
    items = [
        word.item(
            name,
            CONTENTS[draw(st.integers(0, 2))],
            state=draw(st.sampled_from(["enabled", "disabled", "archived", "retired", "paused"])),
            requires=draw(st.sampled_from([[], [], [], ["moonlight"]])),
            replaces=["a:v1"] if name == "a:v2" else [],
            gpu_memory=draw(st.sampled_from([0, 0, 0, 1 << 50])),
        )
        for name in chosen
    ]
    return word.lock(*items, retest_after=draw(st.sampled_from(["1h", "365d"])))


instants = st.sampled_from([NOW, datetime(2026, 11, 20, 10, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC)])
seen = st.builds(BlobSeen, size=st.integers(0, 9), verified_at=st.none() | instants, damaged=st.booleans())
settled: st.SearchStrategy[ModelState] = st.sampled_from(["active", "inactive", "failed"])
TREES = ("sha256:" + "1" * 64, "sha256:" + "2" * 64)


@st.composite
def states(draw: st.DrawFn, lock: Lock) -> NodeState:
    """A store in any state, also in those that no run leaves."""
    recipes = sorted({model.recipe for model in lock.model} | {"elsewhere"})
    blobs = st.dictionaries(st.sampled_from(NAMES), seen)
    smokes = st.sampled_from([lifecycle.smoke_digest(model) for model in lock.model] or [""])
    active = draw(st.dictionaries(st.sampled_from(IDS), st.sampled_from(TREES)))
    trees = st.builds(
        TreeSeen, digest=st.sampled_from(TREES), recipe=st.just(""), blobs=st.lists(st.sampled_from(NAMES), max_size=2).map(tuple),
        bytes=st.integers(0, 9), damaged=st.booleans(),
    )  # fmt: skip
    record = st.builds(
        Record, id=st.just(""), state=st.sampled_from(["absent", "pending", "active", "inactive", "failed", "archived"]),
        recipe=st.sampled_from(recipes), blobs=st.just(()), reason=st.just(""), attempts=st.integers(0, 3), last_error=st.just(""),
        since=st.none(), unlisted_since=st.none() | instants,
    )  # fmt: skip
    passed = st.builds(
        Passed, tree=st.sampled_from(TREES), smoke=smokes, engine=st.just("llama-cpp"),
        engine_version=st.sampled_from(["0.3.36", "0.2"]), device=st.sampled_from(["cpu", "gpu"]), at=instants,
    )  # fmt: skip
    state = NodeState(
        active=Generation(number=draw(st.integers(0, 9)), entries={name: _entry(name, tree) for name, tree in active.items()}),
        blobs=draw(blobs),
        trees={recipe: changed(tree, recipe=recipe) for recipe, tree in draw(st.dictionaries(st.sampled_from(recipes), trees)).items()},
        archived=draw(blobs),
        records={name: changed(found, id=name) for name, found in draw(st.dictionaries(st.sampled_from(IDS), record)).items()},
        passed=draw(st.dictionaries(st.sampled_from(IDS), passed)),
        unfinished=draw(st.booleans()),
    )
    if not lock.model or draw(st.booleans()):
        return state
    said = draw(settled)
    serves = said == "active" or (said == "failed" and draw(st.booleans()))
    return _settled(lock.model[draw(st.integers(0, len(lock.model) - 1))], said, lock, state, serves=serves)


def _settled(model: LockedModel, said: ModelState, lock: Lock, state: NodeState, *, serves: bool) -> NodeState:
    """Return *state* with one model as a run leaves it, cut short right after a swap too: few draws would make one."""
    names = model.blobs
    tree = TreeSeen(digest=TREES[0], recipe=model.recipe, blobs=names, bytes=3)
    passed = Passed(
        tree=TREES[0], smoke=lifecycle.smoke_digest(model), engine="llama-cpp", engine_version="0.3.36", device="cpu", at=NOW
    )  # fmt: skip
    others = {name: entry for name, entry in state.active.entries.items() if name != model.id}
    result: NodeState = changed(
        state,
        active=changed(state.active, entries=others | ({model.id: _entry(model.id, TREES[0])} if serves else {})),
        blobs=state.blobs | {name: BlobSeen(size=3, verified_at=NOW) for name in names},
        trees=state.trees | {model.recipe: tree},
        records=state.records | {model.id: Record(id=model.id, state=said, recipe=model.recipe)},
        passed=state.passed | {model.id: passed},
    )
    return result


def _entry(name: str, tree: str) -> ActiveModel:
    runtime = Runtime(engine="llama-cpp")
    return ActiveModel(id=name, tasks=("completion",), runtime=runtime, path=path_of(name), entrypoint="m", bytes=3, tree=tree)


scenes = locks().flatmap(lambda lock: st.tuples(st.just(lock), states(lock)))
policies = st.builds(
    Policy, reserve_bytes=st.sampled_from([0, 1 << 50]), grace_seconds=st.sampled_from([0.0, 3600.0]),
    only=st.sampled_from([(), ("a:v1",)]), excluded=st.sampled_from([(), ("b:v1",)]),
)  # fmt: skip
nodes = st.sampled_from([FACTS, NodeFacts()])


@given(scenes, policies, nodes)
@settings(max_examples=150, deadline=None)
def test_every_state_has_a_plan_and_every_plan_keeps_the_laws(scene: tuple[Lock, NodeState], policy: Policy, node: NodeFacts) -> None:
    lock, state = scene
    made = plan.diff(lock, "sha256:" + "0" * 64, state, node, policy, now=NOW)
    listed = {model.id: model for model in lock.model}

    assert plan.decode(plan.encode(made)) == made
    assert [change.id for change in made.models] == sorted({*listed, *state.records, *state.active.entries})
    assert [blob.digest for blob in made.blobs] == sorted({blob.digest for blob in made.blobs})
    assert made.changes == (any(change.changes for change in made.models) or state.unfinished or bool(made.active))
    for change in made.models:
        assert change.reason.partition(": ")[0] in lifecycle.REASONS
        assert change.op in lifecycle.OPS
        if change.to == "active" and change.from_ != "active":
            assert listed[change.id].serves
        if change.id not in listed:
            assert change.op in {"remove", "keep"}
            assert change.to != "active"
        if change.id in state.active.entries and not (change.id in listed and _may_serve(listed[change.id], lock, state)):
            assert change.op != "keep", "what the network took away serves on"
        if change.op == "reject" or change.id in policy.excluded:
            assert change.download_bytes == 0
    assert sum(change.download_bytes for change in made.models) == made.summary["download_bytes"]
    assert sum(made.summary[op] for op in lifecycle.OPS) == len(made.models)


def _may_serve(model: LockedModel, lock: Lock, state: NodeState) -> bool:
    """What SPEC 4 says: enabled; or retired, or archived and replaced, until a model that replaces it is active."""
    replacing = [one for one in lock.model if model.id in one.replaces]
    replaced = any(one.serves and one.id in state.active.entries for one in replacing)
    return model.state == "enabled" or (not replaced and (model.state == "retired" or (model.state == "archived" and bool(replacing))))


@pytest.mark.parametrize("excluded", [(), ("a:v1",)])
@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("said", ["absent", "pending", "active", "inactive", "failed", "archived"])
@pytest.mark.parametrize("wanted", ["disabled", "archived", "unlisted"])
def test_what_serves_and_is_taken_away_stops_whatever_is_remembered_of_it(
    wanted: str, said: ModelState, excluded: tuple[str, ...], *, damaged: bool
) -> None:
    """A run that was killed between its swap and its last word left any record beside what serves."""
    word = SnapshotAuthor(Network(), Internet())
    lock = word.lock(*([] if wanted == "unlisted" else [word.item("a:v1", CONTENTS[0], state=wanted)]))
    model = word.lock(word.item("a:v1", CONTENTS[0])).model[0]
    state = _settled(model, said, lock, NodeState(), serves=True)
    if damaged:
        state = changed(state, blobs={name: changed(blob, damaged=True) for name, blob in state.blobs.items()})

    change = plan.diff(lock, "", state, FACTS, Policy(excluded=excluded), now=NOW).models[0]

    assert change.from_ == "active"
    assert change.op != "keep"
    assert not (excluded and change.download_bytes)


@given(scenes)
@settings(max_examples=80, deadline=None)
def test_nothing_is_fetched_that_is_here_and_nothing_damaged_is_left_out(scene: tuple[Lock, NodeState]) -> None:
    lock, state = scene
    made = plan.diff(lock, "", state, FACTS, Policy(), now=NOW)
    ops = {blob.digest: blob.op for blob in made.blobs}

    for name, op in ops.items():
        here = state.blobs.get(name)
        if op == "fetch":
            assert here is None or here.damaged
        elif op == "check":
            assert here is not None
            assert here.verified_at is None or "failed" in {record.state for record in state.records.values()}
        else:
            assert name in state.archived
    for change in made.models:
        if change.op in {"install", "repair", "retest", "enable", "restore"}:
            model = next(model for model in lock.model if model.id == change.id)
            good = {name for name, found in state.blobs.items() if found.verified_at is not None and not found.damaged}
            assert set(model.blobs) <= good | set(ops)


@given(scenes)
@settings(max_examples=40, deadline=None)
def test_a_plan_depends_on_nothing_but_its_arguments(scene: tuple[Lock, NodeState]) -> None:
    lock, state = scene
    backwards = changed(
        state,
        blobs=dict(reversed(state.blobs.items())),
        records=dict(reversed(state.records.items())),
        active=changed(state.active, entries=dict(reversed(state.active.entries.items()))),
    )

    assert plan.diff(lock, "", state, FACTS, Policy(), now=NOW) == plan.diff(lock, "", backwards, FACTS, Policy(), now=NOW)


def test_the_drawn_states_reach_every_row_and_column() -> None:
    """The laws above would be cheap if they were drawn from few states."""
    reached: set[tuple[str, str]] = set()

    @given(scenes)
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    def draw(scene: tuple[Lock, NodeState]) -> None:
        lock, state = scene
        drawn = lifecycle.PlanInput(lock=lock, state=state, node=FACTS, policy=Policy(), now=NOW)
        for model in lock.model:
            column = lifecycle.desired(model, drawn, lifecycle.incompatible(model, FACTS))
            reached.add((lifecycle.classify(model, drawn)[0], column))

    draw()

    assert {row for row, _ in reached} == set(OBSERVED)
    assert {column for _, column in reached} == set(DESIRED) - {"unlisted"} | {"replaced"}


# -- growth ----------------------------------------------------------------------------------------


def _lines_run(work: Callable[[], object]) -> int:
    """Return how many lines of Python *work* runs, each round of a loop counted: what it costs, whatever else the machine does."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def _list_of(models: int, text: bytes, **changes: Any) -> Lock:
    word = SnapshotAuthor(Network(), Internet())
    return word.lock(*(word.item(f"m{number}:v1", {"m": b"%s %d" % (text, number)}, **changes) for number in range(models)))


def _node_with(lock: Lock, state: ModelState = "active") -> NodeState:
    node = NodeState()
    for model in lock.model:
        node = _settled(model, state, lock, node, serves=state == "active")
    return node


def _unverified(node: NodeState) -> NodeState:
    blobs = {name: changed(seen, verified_at=None) for name, seen in node.blobs.items()}
    return changed(node, blobs=blobs)  # type: ignore[no-any-return]


def _half_archived(lock: Lock) -> NodeState:
    """A node whose archived models never reached cold storage with all their blobs."""
    node = _node_with(lock, "archived")
    return changed(node, trees={}, archived={name: seen for name, seen in node.blobs.items() if name < "sha256:8"})  # type: ignore[no-any-return]


GROWTH: dict[str, Callable[[int], tuple[Lock, NodeState]]] = {
    "nothing is here": lambda models: (_list_of(models, b"one"), NodeState()),
    "nothing has changed": lambda models: (_list_of(models, b"one"), _node_with(_list_of(models, b"one"))),
    "each content is another": lambda models: (_list_of(models, b"two"), _node_with(_list_of(models, b"one"))),
    "each content is another, and what serves is to be hashed": lambda models: (
        _list_of(models, b"two"),
        _unverified(_node_with(_list_of(models, b"one"))),
    ),
    "all are disabled": lambda models: (_list_of(models, b"one", state="disabled"), _node_with(_list_of(models, b"one"))),
    "all are archived": lambda models: (_list_of(models, b"one", state="archived"), _node_with(_list_of(models, b"one"))),
    "all are archived in part": lambda models: (
        _list_of(models, b"one", state="archived"),
        _half_archived(_list_of(models, b"one", state="archived")),
    ),
    "none is listed": lambda models: (_list_of(0, b"one"), _node_with(_list_of(models, b"one"))),
    "none fits the GPU": lambda models: (_list_of(models, b"one", gpu_memory=1 << 50), _node_with(_list_of(models, b"one"))),
    "all failed": lambda models: (_list_of(models, b"one"), _node_with(_list_of(models, b"one"), "failed")),
}


@pytest.mark.parametrize("case", GROWTH)
def test_a_plan_of_twice_as_many_models_takes_twice_the_work(case: str) -> None:
    work = []
    for models in (300, 600):
        lock, node = GROWTH[case](models)
        work.append(_lines_run(lambda lock=lock, node=node: plan.diff(lock, "", node, FACTS, Policy(), now=NOW)))  # type: ignore[misc]

    assert work[1] < 2.3 * work[0], work
