"""
Corrections of a listed model, any field of it but its content; and rollouts: models that reach a network step by step.

Rules that hold here:

1. A place is written as ``inspect --full`` shows it, within the model: ``smoke.expect.regex``, ``artifacts[tiny.gguf].urls``.
2. Id, path, digest, size and archive kind are not edited: other content is another version, which nodes install beside the old one.
3. What is set is checked as what is decoded; a field that nodes would ignore is refused, with the nearest known one.
4. A model is in one rollout at most, and a rollout names listed models alone.
5. A model in a rollout says that its readers must know rollouts (``requires``): older nodes would install it everywhere at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from reconciler.core.errors import PublishError
from reconciler.core.snapshot import Artifact, Expect, Model, Rollout, Runtime, Smoke, Snapshot
from reconciler.publish import envelopes

_STEP = re.compile(r"\.?([A-Za-z_]\w*)|\[([^\[\]]+)\]", re.ASCII)
_CONTENT = frozenset({"name", "version", "artifacts", *(f"artifacts.{name}" for name in ("path", "digest", "size", "unpack"))})
_KINDS = {"": Model, "runtime": Runtime, "smoke": Smoke, "smoke.expect": Expect, "artifacts": Artifact}


def with_values(model: Model, values: Mapping[str, Any], removed: tuple[str, ...] = ()) -> Model:
    """
    Return *model* with *values* at their places, and without what is *removed*, so that its default holds again.

    Raises:
        PublishError: there is no such place, it is content, or nodes would refuse the value.
    """
    tree: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(model))
    for place, value in values.items():
        parent, name = _locate(tree, place)
        parent[name] = msgspec.to_builtins(value)
    for place in removed:
        parent, name = _locate(tree, place)
        parent.pop(name, None)
    try:
        return msgspec.convert(tree, Model)
    except (msgspec.ValidationError, ValueError) as error:
        text = envelopes.describe_decode_error(str(error)).replace("`$.", "`")
        raise PublishError(f"nodes would refuse this model: {text}") from None


def _locate(tree: dict[str, Any], place: str) -> tuple[dict[str, Any], str]:
    """Return the object that holds *place*, and the field's name in it."""
    steps = [(name, label) for name, label in _STEP.findall(place)]
    if "".join(f".{name}" if name else f"[{label}]" for name, label in steps).lstrip(".") != place or not steps or not steps[-1][0]:
        raise PublishError(
            f"{place[:200]!r} is no place in a model",
            hint="write it as `reconcile snapshot inspect --full FILE` shows it, such as smoke.expect.regex",
        )
    current, where = tree, ""
    for name, label in steps[:-1]:
        if label:
            current = _artifact(current, label)
            continue
        _refuse_unknown(where, name)
        where = f"{where}.{name}".lstrip(".")
        current = current.setdefault(name, {})
    last = steps[-1][0]
    _refuse_unknown(where, last)
    if f"{where}.{last}".lstrip(".") in _CONTENT:
        raise PublishError(f"{place} is content, which is not edited", hint="add other content as another version, as in name:v2")
    return current, last


def _artifact(artifacts: Any, label: str) -> dict[str, Any]:
    found: dict[str, Any] | None = next((one for one in artifacts if one["path"] == label), None) if isinstance(artifacts, list) else None
    if found is not None:
        return found
    raise PublishError(f"the model has no artifact {label[:200]!r}")


def _refuse_unknown(where: str, name: str) -> None:
    kind = _KINDS.get(where)
    known = kind.__struct_fields__ if kind else ()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known there: {', '.join(known) or 'nothing'}"
        raise PublishError(f"nodes would ignore {f'{where}.{name}'.lstrip('.')[:200]!r}", hint=hint)


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
                    f"{model} is in rollout {other!r} already", hint=f"`reconcile snapshot rollout FILE {other} --end` ends that one"
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
