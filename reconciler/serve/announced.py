"""
The kinds ``command`` and ``http``: whoever is told gets the index of its models, and nothing is written.

A command gets it on standard input, as the hooks do; an address gets it as the body of a POST.
"""

from __future__ import annotations

from typing import Any

from reconciler.serve.content import Content
from reconciler.serve.served_model import ServedModel
from reconciler.serve.server import Server


def content(server: Server, models: tuple[ServedModel, ...]) -> Content:
    """Return nothing to write: the index, which goes with every reload, is all that these get."""
    del server
    return Content(names=tuple(model.id for model in models))


def check_options(options: dict[str, Any]) -> str:
    """Return what is wrong with *options*, or an empty text."""
    unknown = sorted(options.keys() - {"metrics"})
    return f"{unknown[0]!r} is not known; there is 'metrics'" if unknown else ""
