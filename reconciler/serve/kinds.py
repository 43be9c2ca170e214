"""The kinds of servers, by the name that the settings use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from reconciler.serve import announced, hf_cache, llama_cpp_python, llama_server, llama_swap, ollama
from reconciler.serve.content import Content
from reconciler.serve.served_model import ServedModel
from reconciler.serve.server import Server


class Kind(Struct, frozen=True, kw_only=True):
    """What is special about one kind of server."""

    #: Turns models into what it reads.
    content: Callable[[Server, tuple[ServedModel, ...]], Content]
    #: Returns what is wrong with options, or an empty text.
    check_options: Callable[[dict[str, Any]], str]
    #: Its reload gets the index, so that it is told again when anything in that changes.
    gets_index: bool = False


KINDS: dict[str, Kind] = {
    "llama-server": Kind(content=llama_server.content, check_options=llama_server.check_options),
    "llama-swap": Kind(content=llama_swap.content, check_options=llama_swap.check_options),
    "llama-cpp-python": Kind(content=llama_cpp_python.content, check_options=llama_cpp_python.check_options),
    "hf-cache": Kind(content=hf_cache.content, check_options=hf_cache.check_options),
    "ollama": Kind(content=ollama.content, check_options=ollama.check_options),
    "command": Kind(content=announced.content, check_options=announced.check_options, gets_index=True),
    "http": Kind(content=announced.content, check_options=announced.check_options, gets_index=True),
}
