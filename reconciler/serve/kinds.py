"""
The kinds of servers, by the name that the settings use.

The kinds ``command`` and ``http`` get the index of their models, and nothing is written for them: a command gets it on standard input, as
the hooks do; an address gets it as the body of a POST.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from reconciler.serve import hf_cache, llama_cpp_python, llama_server, llama_swap, ollama
from reconciler.serve.content import Content, Server
from reconciler.serve.served_model import ServedModel


class Kind(Struct, frozen=True, kw_only=True):
    """What is special about one kind of server."""

    #: Turns models into what it reads.
    content: Callable[[Server, tuple[ServedModel, ...]], Content]
    #: Returns what is wrong with options, or an empty text.
    check_options: Callable[[dict[str, Any]], str]
    #: Its reload gets the index, so that it is told again when anything in that changes.
    gets_index: bool = False


def announced(server: Server, models: tuple[ServedModel, ...]) -> Content:
    """Return nothing to write: the index, which goes with every reload, is all that these get."""
    del server
    return Content(names=tuple(model.id for model in models))


def check_announced(options: dict[str, Any]) -> str:
    """Return what is wrong with *options*, or an empty text."""
    unknown = sorted(options.keys() - {"metrics"})
    return f"{unknown[0]!r} is not known; there is 'metrics'" if unknown else ""


KINDS: dict[str, Kind] = {
    "llama-server": Kind(content=llama_server.content, check_options=llama_server.check_options),
    "llama-swap": Kind(content=llama_swap.content, check_options=llama_swap.check_options),
    "llama-cpp-python": Kind(content=llama_cpp_python.content, check_options=llama_cpp_python.check_options),
    "hf-cache": Kind(content=hf_cache.content, check_options=hf_cache.check_options),
    "ollama": Kind(content=ollama.content, check_options=ollama.check_options),
    "command": Kind(content=announced, check_options=check_announced, gets_index=True),
    "http": Kind(content=announced, check_options=check_announced, gets_index=True),
}
