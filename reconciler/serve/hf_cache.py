"""
A Hugging Face cache folder (``HF_HUB_CACHE``) of links, in which ``from_pretrained`` and vLLM find the active models offline.

The repository is the model's name, under the option ``namespace`` where there is one; the revision is its version, and ``main`` its current
version. A snapshot's folder is one link to the model's tree, under the first 40 digits of the tree's digest, where the hub has a commit.
"""

from __future__ import annotations

import re
from typing import Any

from reconciler.serve.content import Content, Entry, Server
from reconciler.serve.served_model import ServedModel


def content(server: Server, models: tuple[ServedModel, ...]) -> Content:
    """Return the links and references of *models*: first the folders, then what leads to them."""
    folders, references = dict[str, Entry](), list[Entry]()
    namespace = str(server.options.get("namespace", ""))
    for model in models:
        repository = "--".join(("models", *((namespace,) if namespace else ()), model.name))
        commit = model.tree.partition(":")[2][:40]
        path = f"{repository}/snapshots/{commit}"
        folders[path] = Entry(path=path, target=model.folder)
        for revision in (model.version, *(("main",) if model.current else ())):
            references.append(Entry(path=f"{repository}/refs/{revision}", data=commit.encode()))
    names = tuple(f"{namespace}/{model.name}" if namespace else model.name for model in models)
    return Content(entries=(*folders.values(), *references), names=tuple(dict.fromkeys(names)))


def check_options(options: dict[str, Any]) -> str:
    """Return what is wrong with *options*, or an empty text."""
    if unknown := sorted(options.keys() - {"namespace", "metrics"}):
        return f"{unknown[0]!r} is not known; there are 'namespace' and 'metrics'"
    namespace = options.get("namespace", "")
    if not isinstance(namespace, str) or not re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{0,95})?", namespace) or "--" in namespace:
        return f"'namespace' is {namespace!r}, which is no namespace of a hub"
    return ""
