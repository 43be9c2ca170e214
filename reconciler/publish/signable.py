"""
What the network's operator must not sign although it is a well-formed snapshot: nodes would not do what it is meant to say.

A node ignores fields, and leaves alone models, of a newer version (SPEC 4). Whoever signs means every word, so here they are refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from reconciler.core import lock as locks
from reconciler.core.errors import PublishError
from reconciler.core.snapshot import Artifact, Expect, Model, Rollout, Runtime, Smoke, Snapshot, Sources
from reconciler.core.swarm import Swarm, Torrent
from reconciler.publish import envelopes

#: The names of all fields of a snapshot.
_KINDS = (Snapshot, Sources, Rollout, Swarm, Torrent, Model, Runtime, Smoke, Expect, Artifact)
_FIELDS = sorted({name for kind in _KINDS for name in kind.__struct_fields__})


def refuse_unknown(found: Snapshot, payload: bytes) -> None:
    """
    Refuse words that nodes of this version do not know, and fields that they would ignore and that look misspelt or misplaced.

    Raises:
        PublishError: names the first of them.
    """
    for model in found.models:
        if words := locks.compile_model(model).unknown_words:
            raise PublishError(
                f"{model.id}: this version of reconcile does not know {', '.join(words)}; its nodes would not run the model",
                hint="`reconcile --version --json` lists the words that it knows; use a version that knows this one, or correct it",
            )
    for place in envelopes.ignored_fields(payload, found):
        name = place.rpartition(".")[2]
        if near := difflib.get_close_matches(name.lower(), _FIELDS, n=1, cutoff=0.8):
            hint = f"{name!r} does not stand there" if near[0] == name else f"did you mean {near[0]!r}?"
            raise PublishError(f"nodes would ignore the unknown field {place[:200]!r}", hint=hint)


def refusal(check: Callable[[Snapshot], None], found: Snapshot) -> PublishError | None:
    """Return what *check* refuses in *found*, or None."""
    try:
        check(found)
    except PublishError as error:
        return error
    return None


def refuse_empty_rollout(found: Snapshot) -> None:
    """
    Refuse a rollout that names a model which is not listed: a misspelt one would go to every node at once.

    Raises:
        PublishError: names the first of them.
    """
    listed = {model.id for model in found.models}
    for name, rollout in (found.rollouts or {}).items():
        for model in rollout.models:
            if model not in listed:
                raise PublishError(
                    f"rollout {name!r} names {model}, which is not listed", hint=f"`reconcile snapshot rollout FILE {name} --end` ends it"
                )


def refuse_never_replaced(found: Snapshot) -> None:
    """
    Refuse a retired model that nothing replaces: nodes would serve it for ever, and new nodes would never have it.

    Raises:
        PublishError: names the first of them.
    """
    replaced = {old for model in found.models for old in model.replaces or ()}
    for model in found.models:
        if model.state == "retired" and model.id not in replaced:
            raise PublishError(
                f"{model.id} is retired, and no listed model replaces it",
                hint="enable it, remove it, or add its replacement with --replaces",
            )
