"""
llama-server (llama.cpp) in router mode: a file of model presets, and ``GET /models?reload=1``.

Rules that hold here:

1. A section is a model that clients name. llama-server writes what follows a colon in a section's name in capitals (it takes it for a
   quantisation), so no section's name has one: the section of a name's current version is the bare name, that of another version is
   ``name@version``. The model id is the section's alias.
2. The alias of a model that runs is never read again, and a name that is taken makes a reload fail half-way. So aliases never move from
   one running section to another: when the version of a bare name changes, so do the section's ``model`` and ``tags``, and llama-server
   unloads it. ``tags`` stands there because an alias alone is no change for it.
3. Values end at ``;`` and ``#``, and there is no way to quote them: a model whose path has one is left out, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from reconciler.serve.content import Content, Entry, Server
from reconciler.serve.served_model import ServedModel

_HEAD = "; Made by reconcile, which replaces it at each change of the active set. Options belong in [[serve]] of reconcile.toml.\n"
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
#: Keys that are written here, or that would serve what the network did not approve.
RESERVED = frozenset(
    (
        "model", "m", "alias", "a", "tags", "mmproj", "mm", "lora", "lora-scaled", "spec-draft-model", "model-draft", "md", "hf", "hf-repo",
        "hfr", "hf-file", "hff", "model-url", "mu", "mmproj-url", "mmu", "docker-repo", "dr", "models-dir", "models-preset", "host", "port",
    )
)  # fmt: skip


def content(server: Server, models: tuple[ServedModel, ...]) -> Content:
    """Return the presets of *models*: scalars among the options are for all of them, tables for the model that they name."""
    shared = {key: value for key, value in server.options.items() if not isinstance(value, dict)}
    sections = [_section("*", _lines(shared))] if shared else []
    left_out, names = [], []
    for model in models:
        if fault := unsayable(model):
            left_out.append(f"{model.id}: {fault}")
            continue
        names.append(section_of(model))
        own = {key: value for name in (model.name, model.id) for key, value in server.options.get(name, {}).items()}
        head = [("alias", model.id), *((key, value) for key, value in arguments(model)), ("tags", model.id)]
        sections.append(_section(section_of(model), [*head, *_lines(own)]))
    text = "\n".join([_HEAD, *sections])
    return Content(entries=(Entry(data=text.encode()),), names=tuple(names), left_out=tuple(left_out))


def section_of(model: ServedModel) -> str:
    """Return the name under which llama-server lists *model*."""
    return model.name if model.current else f"{model.name}@{model.version}"


def arguments(model: ServedModel) -> list[tuple[str, str]]:
    """Return the arguments, without dashes, with which llama-server serves *model*: each file by its role."""
    found = [("model", model.entrypoint_path)]
    found += [("mmproj", path) for path in model.of_role("mmproj")[:1]]
    if adapters := model.of_role("lora"):
        found.append(("lora", ",".join(adapters)))
    found += [("model-draft", path) for path in model.of_role("draft")[:1]]
    found += [("chat-template-file", path) for path in model.of_role("template")[:1] if path.endswith((".jinja", ".jinja2"))]
    return [*found, *([("embeddings", "true")] if model.only_embeds else [])]


def unsayable(model: ServedModel) -> str:
    """Return why the presets cannot say *model*, or an empty text."""
    for _, value in arguments(model):
        if found := re.search(r"[;#]|^\s|\s$", value):
            return f"{value!r} has {found[0]!r}, which llama-server's file of presets cannot say"
    adapters = model.of_role("lora")
    return f"{adapters[0]!r} has ',', which separates adapters" if any("," in path for path in adapters) else ""


def check_options(options: dict[str, Any]) -> str:
    """Return what is wrong with *options*, or an empty text."""
    tables = [value for value in options.values() if isinstance(value, dict)]
    scalars = {key: value for key, value in options.items() if not isinstance(value, dict)}
    for key, value in (pair for table in (scalars, *tables) for pair in table.items()):
        if not _KEY.fullmatch(key):
            return f"{key!r} is no argument of llama-server, without its dashes"
        if key in RESERVED:
            return f"{key!r} is written by reconcile"
        if not isinstance(value, str | int | float) or re.search(r"[;#\r\n]", str(value)):
            return f"{key!r} is neither a number, true or false, nor a text without ; # and line ends"
    return ""


def _lines(options: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, str(value).lower() if isinstance(value, bool) else str(value)) for key, value in options.items()]


def _section(name: str, lines: Iterable[tuple[str, str]]) -> str:
    return "".join([f"[{name}]\n", *(f"{key} = {value}\n" for key, value in lines)])


def sections(text: str) -> dict[str, str]:
    """Return the sections of a file that was written here, by name; options for all models are part of each."""
    found: dict[str, str] = dict(re.findall(r"^\[([^]]+)\]\n((?:[^[\n].*\n)*)", text, re.MULTILINE))
    shared = found.pop("*", "")
    return {name: shared + body for name, body in found.items()}
