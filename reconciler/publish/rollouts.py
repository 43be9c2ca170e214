"""
Rollouts for the network's operators: models that reach a network step by step.

Rules that hold here:

1. A model is in one rollout at most, and a rollout names listed models alone.
2. A model in a rollout says that its readers must know rollouts (``requires``): older nodes would install it everywhere at once.
"""

from __future__ import annotations

from msgspec import UNSET
from msgspec.structs import replace

from reconciler.core.errors import PublishError
from reconciler.core.snapshot import Model, Rollout, Snapshot

_WORD = "rollouts"


def with_rollout(
    found: Snapshot, name: str, *, models: tuple[str, ...] = (), per_10000: int | None = None, cohorts: tuple[str, ...] | None = None
) -> Snapshot:
    """
    Return *found* with the rollout *name*: new, or with what is given in place of what it had; *models* are added to it.

    Raises:
        PublishError: a model is not listed, or in another rollout; or a new rollout has no models.
    """
    rollouts = dict(found.rollouts or {})
    before = rollouts.get(name, Rollout())
    listed = {model.id for model in found.models}
    for model in models:
        if model not in listed:
            raise PublishError(f"the snapshot lists no model {model[:200]!r}", hint="`reconcile snapshot inspect FILE` lists them")
        for other, rollout in rollouts.items():
            if other != name and model in rollout.models:
                raise PublishError(
                    f"{model} is in rollout {other!r} already", hint=f"end that one with `reconcile snapshot rollout … {other} --end`"
                )
    rollouts[name] = Rollout(
        models=tuple(dict.fromkeys((*before.models, *models))),
        per_10000=before.per_10000 if per_10000 is None else per_10000,
        cohorts=before.cohorts if cohorts is None else cohorts,
    )
    if not rollouts[name].models:
        raise PublishError(f"there is no rollout {name!r}", hint="name the models of a new one with --model")
    named = {*rollouts[name].models}
    return replace(found, rollouts=rollouts, models=tuple(_requiring(model) if model.id in named else model for model in found.models))


def without_rollout(found: Snapshot, name: str) -> Snapshot:
    """
    Return *found* without the rollout *name*: its models are for every node.

    Raises:
        PublishError: there is none of that name.
    """
    rollouts = dict(found.rollouts or {})
    ended = rollouts.pop(name, None)
    if ended is None:
        raise PublishError(f"there is no rollout {name!r}", hint=f"there are: {', '.join(rollouts) or 'none'}")
    models = tuple(_not_requiring(model) if model.id in ended.models else model for model in found.models)
    return replace(found, rollouts=rollouts or UNSET, models=models)


def _requiring(model: Model) -> Model:
    words = model.requires or ()
    return model if _WORD in words else replace(model, requires=(*words, _WORD))


def _not_requiring(model: Model) -> Model:
    return replace(model, requires=tuple(word for word in model.requires or () if word != _WORD) or UNSET)
