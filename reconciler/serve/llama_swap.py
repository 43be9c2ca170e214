"""
llama-swap: its configuration file, with one command line for each model.

What is written is JSON, which is YAML (YAML 1.2, section 1.3). The option ``cmd`` is the command line of all models; ``{model}``,
``{folder}``, ``{name}``, ``{id}`` and ``{arguments}`` are filled in, quoted as a shell does. Tables among the options whose name is a
model's id or name go into that model's entry, all other options to the top of the file.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from reconciler.serve import llama_server
from reconciler.serve.content import Content, Entry, Server
from reconciler.serve.served_model import ServedModel

#: llama-swap fills in the port.
_COMMAND = "llama-server --host 127.0.0.1 --port ${PORT} {arguments}"
_HEAD = "# Made by reconcile, which replaces it at each change of the active set.\n"


def content(server: Server, models: tuple[ServedModel, ...]) -> Content:
    """Return the configuration for *models*."""
    command = str(server.options.get("cmd", _COMMAND))
    own = {name for model in models for name in (model.id, model.name)}
    top = {key: value for key, value in server.options.items() if key != "cmd" and not (key in own and isinstance(value, dict))}
    left_out = [f"{model.id}: {fault}" for model in models if (fault := _unsayable(model))]
    said = [model for model in models if not _unsayable(model)]
    entries = {model.id: _entry(model, command, server.options) for model in said}
    text = _HEAD + json.dumps(top | {"models": entries}, indent=2, ensure_ascii=False) + "\n"
    return Content(entries=(Entry(data=text.encode()),), names=tuple(entries), left_out=tuple(left_out))


def _entry(model: ServedModel, command: str, options: dict[str, Any]) -> dict[str, Any]:
    arguments = " ".join(_argument(key, value) for key, value in llama_server.arguments(model))
    filled = {"model": model.entrypoint_path, "folder": model.folder, "name": model.name, "id": model.id}
    for key, value in filled.items():
        command = command.replace(f"{{{key}}}", shlex.quote(value))
    made: dict[str, Any] = {"cmd": command.replace("{arguments}", arguments)}
    if model.current:
        made["aliases"] = [model.name]
    for name in (model.name, model.id):
        made |= options[name] if isinstance(options.get(name), dict) else {}
    return made


def _argument(key: str, value: str) -> str:
    return f"--{key}" if key == "embeddings" else f"--{key} {shlex.quote(value)}"


def _unsayable(model: ServedModel) -> str:
    """Return why a command line cannot say *model*: llama-swap reads ``${...}`` as a macro, also in quotes."""
    paths = [value for _, value in llama_server.arguments(model)]
    return next((f"{path!r} has '${{', which begins a macro of llama-swap" for path in paths if "${" in path), "")


def check_options(options: dict[str, Any]) -> str:
    """Return what is wrong with *options*, or an empty text."""
    if "models" in options:
        return "'models' is written by reconcile"
    command = options.get("cmd", _COMMAND)
    if not isinstance(command, str) or not ("{model}" in command or "{folder}" in command or "{arguments}" in command):
        return "'cmd' is no command line with {model}, {folder} or {arguments}"
    return ""
