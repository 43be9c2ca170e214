"""
What a fleet's statuses mean: for each model how many nodes serve it, who lags, who failed and why, and whether it is safe to widen.

Rules that hold here:

1. Pure: statuses in, a report out; the instant is an argument.
2. A node counts once, with its newest status. A silent node serves nothing; where it last spoke of a model, it counts against that model:
   a model that ends the machine must not look better than one that fails its test.
3. Of a model, *tried* are the nodes that serve it, on which it failed, and that fell silent with it. A node that is held back by a
   rollback failed. A node that cannot run it, or still waits for it, says nothing about it.
4. How long a node has served a model is counted up to its newest status, not up to now: of the time since, nobody knows. A node that has
   not been heard since its time was over does not speak for the model: too many of them are as too few that serve it.
5. The verdict is *unsafe* as soon as too many failed, *not-yet* while too few served for long enough, and *safe* otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Literal

from msgspec import Struct

from reconciler.core import units
from reconciler.fleet.collect import Collected
from reconciler.fleet.statement import NodeReport, ReportedModel

#: Nodes that are named in a list; how many there are is always said.
NAMED = 20


class Rule(Struct, frozen=True, kw_only=True):
    """When a model may go to more nodes."""

    #: The largest part, between 0 and 1, of the nodes that tried it on which it may have failed.
    max_failed: float = 0.01
    #: So many nodes must serve it, ...
    min_nodes: int = 1
    #: ... each for so long.
    after_seconds: float = 0.0


class Cause(Struct, frozen=True, kw_only=True):
    """Why a model failed, and on how many nodes."""

    text: str  #: What the nodes say.
    count: int  #: On how many.
    nodes: tuple[str, ...]  #: Ids of some of them, sorted.


class ModelReport(Struct, frozen=True, kw_only=True):
    """One model in the fleet."""

    id: str  #: Model id.
    serving: int = 0  #: Nodes that serve it.
    settled: int = 0  #: Nodes of these that have served it for as long as the rule asks.
    unheard: int = 0  #: Nodes of these that would have by now, and whose newest status is from before.
    failed: int = 0  #: Nodes on which it failed, or is held back by a rollback.
    silent: int = 0  #: Nodes that fell silent with it.
    waiting: int = 0  #: Nodes that do not have it yet: absent, or not tested.
    incompatible: int = 0  #: Nodes that cannot run it.
    other: int = 0  #: Nodes where it is disabled or archived.
    trees: int = 0  #: Different contents that are served under this id; more than one is a fault.
    causes: tuple[Cause, ...] = ()  #: Why it failed, the most frequent first.

    @property
    def tried(self) -> int:
        """Nodes that say something about it."""
        return self.serving + self.failed + self.silent


class NodeList(Struct, frozen=True, kw_only=True):
    """How many nodes, and some of them by id."""

    count: int
    nodes: tuple[str, ...] = ()


class Verdict(Struct, frozen=True, kw_only=True):
    """What the rule says."""

    word: Literal["safe", "not-yet", "unsafe"]  #: Whether the models may go to more nodes.
    reasons: tuple[str, ...]  #: Why, a sentence for each model that decides it.
    rule: Rule  #: The rule.


class FleetReport(Struct, frozen=True, kw_only=True):
    """A fleet at an instant."""

    schema: Literal[1] = 1  #: Version of this form.
    network: str  #: The network's name.
    at: datetime  #: When it was made.
    files: int  #: Files that were read.
    nodes: int  #: Nodes whose newest status is fresh.
    snapshot: int  #: The newest snapshot that one of them has.
    active_sets: int  #: Different sets that they serve.
    lagging: NodeList  #: Nodes with an older snapshot.
    unserved: NodeList  #: Nodes that lack a model that others serve, can run it, and did not fail with it.
    refusing: NodeList  #: Nodes that refuse the snapshot or the lock.
    unreachable: NodeList  #: Nodes that cannot fetch the snapshot.
    held: NodeList  #: Nodes that a rollback holds.
    silent: NodeList  #: Nodes whose newest status is stale.
    missing: NodeList  #: Nodes whose key is known and of which there is no status.
    refused: dict[str, int]  #: Files that count for nothing, by reason.
    models: tuple[ModelReport, ...]  #: Every model, sorted by model id.
    verdict: Verdict | None = None  #: What the rule says; null without a rule.


def assess(found: Collected, *, now: datetime, rule: Rule | None = None, judged: Iterable[str] = ()) -> FleetReport:
    """Return the report of *found* at *now*; *judged* are the models that *rule* is about, none: all that any node tried."""
    fresh, silent = found.fresh, found.silent
    newest = max((report.snapshot.version for report in fresh), default=0)
    after = timedelta(seconds=rule.after_seconds if rule else 0.0)
    ids = sorted({model.id for report in (*fresh, *silent) for model in report.models} | set(judged))
    by_model = _by_model(fresh)
    fell_silent = Counter(model.id for report in silent for model in report.models if _was_tried(model))
    models = tuple(_model(one, by_model.get(one, []), fell_silent[one], now, after) for one in ids)
    return FleetReport(
        network=found.network,
        at=now,
        files=found.files,
        nodes=len(fresh),
        snapshot=newest,
        active_sets=len({report.active_digest for report in fresh}),
        lagging=_listed(report.node for report in fresh if report.snapshot.version < newest),
        unserved=_listed(report.node for report in fresh if any(_kind(model) == "waiting" for model in report.models)),
        refusing=_listed(report.node for report in fresh if report.refused),
        unreachable=_listed(report.node for report in fresh if report.unreachable_since is not None),
        held=_listed(report.node for report in fresh if report.held),
        silent=_listed(report.node for report in silent),
        missing=_listed(found.missing),
        refused=dict(sorted(Counter(one.reason for one in found.refused).items())),
        models=models,
        verdict=_verdict(models, rule, frozenset(judged)) if rule else None,
    )


def _by_model(reports: tuple[NodeReport, ...]) -> dict[str, list[tuple[NodeReport, ReportedModel]]]:
    found: dict[str, list[tuple[NodeReport, ReportedModel]]] = {}
    for report in reports:
        for model in report.models:
            found.setdefault(model.id, []).append((report, model))
    return found


_Kind = Literal["serving", "failed", "waiting", "incompatible", "other"]
#: Reasons of models that the node is not to serve.
_NOT_WANTED = frozenset({"not-listed", "disabled-by-snapshot", "archived-by-snapshot", "retired-by-snapshot", "replaced", "excluded"})


def _kind(model: ReportedModel) -> _Kind:
    if model.state == "active":
        return "serving"
    if model.state == "failed" or model.reason == "held":
        return "failed"
    if model.reason == "incompatible":
        return "incompatible"
    if model.state in {"inactive", "archived"} or model.reason in _NOT_WANTED:
        return "other"
    return "waiting"


def _was_tried(model: ReportedModel) -> bool:
    """Whether a node that fell silent was at work on *model*: it served it, had failed with it, or was bringing it."""
    return _kind(model) in {"serving", "failed", "waiting"}


def _model(name: str, nodes: list[tuple[NodeReport, ReportedModel]], silent: int, now: datetime, after: timedelta) -> ModelReport:
    kinds = Counter(_kind(model) for _, model in nodes)
    serving = [(report, model) for report, model in nodes if model.state == "active"]
    settled_at = [(report.at, model.since + after) for report, model in serving if model.since is not None]
    return ModelReport(
        id=name,
        serving=kinds["serving"],
        settled=sum(settled <= heard for heard, settled in settled_at),
        unheard=sum(heard < settled <= now for heard, settled in settled_at),
        failed=kinds["failed"],
        silent=silent,
        waiting=kinds["waiting"],
        incompatible=kinds["incompatible"],
        other=kinds["other"],
        trees=len({model.tree for _, model in serving}),
        causes=_causes((report.node, model) for report, model in nodes if _kind(model) == "failed"),
    )


def _causes(failed: Iterable[tuple[str, ReportedModel]]) -> tuple[Cause, ...]:
    by_text: dict[str, list[str]] = {}
    for node, model in failed:
        by_text.setdefault(model.detail or model.reason or model.state, []).append(node)
    found = [Cause(text=text, count=len(nodes), nodes=tuple(sorted(nodes)[:NAMED])) for text, nodes in by_text.items()]
    return tuple(sorted(found, key=lambda cause: (-cause.count, cause.text))[:NAMED])


def _listed(nodes: Iterable[str]) -> NodeList:
    found = sorted(nodes)
    return NodeList(count=len(found), nodes=tuple(found[:NAMED]))


def _verdict(models: tuple[ModelReport, ...], rule: Rule, judged: frozenset[str]) -> Verdict:
    chosen = [model for model in models if (model.id in judged if judged else model.tried)]
    unsafe = [f"{model.id}: {why}" for model in chosen if (why := _why_unsafe(model, rule))]
    early = [f"{model.id}: {why}" for model in chosen if (why := _why_early(model, rule))]
    if unsafe:
        return Verdict(word="unsafe", reasons=tuple(unsafe), rule=rule)
    if early or not chosen:
        return Verdict(word="not-yet", reasons=tuple(early) or ("no node has tried any model",), rule=rule)
    return Verdict(word="safe", reasons=tuple(f"{one.id}: {one.settled} nodes serve it, {_share(one)} failed" for one in chosen), rule=rule)


def _why_unsafe(model: ModelReport, rule: Rule) -> str:
    if model.trees > 1:
        return f"nodes serve {model.trees} different contents under this id"
    against = model.failed + model.silent
    if against <= rule.max_failed * model.tried:
        return ""
    parts = [f"failed on {model.failed}" if model.failed else "", f"silent since: {model.silent}" if model.silent else ""]
    return f"{' and '.join(filter(None, parts))} of {model.tried} nodes ({_share(model)}), more than {100 * rule.max_failed:.3g} % of them"


def _why_early(model: ModelReport, rule: Rule) -> str:
    if model.settled < rule.min_nodes:
        time = f" for {units.human_time(rule.after_seconds)}" if rule.after_seconds else ""
        return f"{model.settled} of {rule.min_nodes} nodes have served it{time}"
    if model.failed + model.silent + model.unheard > rule.max_failed * model.tried:
        return f"{units.count(model.unheard, 'node')} began to serve it long enough ago, and did not say since whether they still do"
    return ""


def _share(model: ModelReport) -> str:
    return f"{100 * (model.failed + model.silent) / max(model.tried, 1):.3g} %"
