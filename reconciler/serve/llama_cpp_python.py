"""
The server of llama-cpp-python (``python -m llama_cpp.server --config_file``): its configuration file.

It holds one model in memory at a time, has no reload, and does not start without a model; its reload is a command that restarts it. A name
that it does not know it answers with its first model.
"""

from __future__ import annotations

import json
from typing import Any

from reconciler.serve.content import Content, Entry, Server
from reconciler.serve.served_model import ServedModel

#: The options that are the server's; all others are each model's.
_OF_THE_SERVER = frozenset(
    ("host", "port", "ssl_keyfile", "ssl_certfile", "api_key", "interrupt_requests", "disable_ping_events", "root_path")
)
#: What is written here.
_RESERVED = frozenset(("models", "model", "model_alias", "lora_path", "clip_model_path", "hf_model_repo_id"))


def content(server: Server, models: tuple[ServedModel, ...]) -> Content:
    """Return the configuration for *models*: an entry for each id, and one for each bare name."""
    top = {key: value for key, value in server.options.items() if key in _OF_THE_SERVER}
    shared = {key: value for key, value in server.options.items() if key not in _OF_THE_SERVER and not isinstance(value, dict)}
    asked = [(name, model) for model in models for name in (*((model.name,) if model.current else ()), model.id)]
    entries = [shared | _entry(name, model) | _own(model, server.options) for name, model in asked]
    text = json.dumps(top | {"models": entries}, indent=2, ensure_ascii=False) + "\n"
    return Content(entries=(Entry(data=text.encode()),), names=tuple(name for name, _ in asked))


def _entry(name: str, model: ServedModel) -> dict[str, Any]:
    made: dict[str, Any] = {"model": model.entrypoint_path, "model_alias": name}
    if adapters := model.of_role("lora"):
        made["lora_path"] = adapters[0]
    if projectors := model.of_role("mmproj"):
        made["clip_model_path"] = projectors[0]
    return made | ({"embedding": True} if "embedding" in model.tasks else {})


def _own(model: ServedModel, options: dict[str, Any]) -> dict[str, Any]:
    tables = [options[name] for name in (model.name, model.id) if isinstance(options.get(name), dict)]
    return {key: value for table in tables for key, value in table.items()}


def check_options(options: dict[str, Any]) -> str:
    """Return what is wrong with *options*, or an empty text."""
    tables = (options, *(value for value in options.values() if isinstance(value, dict)))
    found = sorted(_RESERVED.intersection(*[{key for table in tables for key in table}]))
    return f"{found[0]!r} is written by reconcile" if found else ""
