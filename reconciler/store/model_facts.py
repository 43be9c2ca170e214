"""
What a model's files tell of it, for the index: the header of a GGUF file, or ``config.json`` and the headers of safetensors files.

The files were tested before. Nothing here decides anything, so a file that cannot be read has no facts, and is no error.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct, structs

from reconciler.store.ledger import Listing

if TYPE_CHECKING:
    from reconciler.core.gguf import GgufFacts

#: A configuration or a header of safetensors that is larger is not read.
_MOST_BYTES = 16 << 20


class ModelFacts(Struct, frozen=True, kw_only=True):
    """What files tell; None where they do not."""

    context_length: int | None = None
    quantization: str | None = None
    parameters: int | None = None
    architecture: str | None = None
    embedding_length: int | None = None
    chat_template: bool = False
    #: What each file is for, by its header or its name (``core.roles``); what the network says of it counts more.
    roles: dict[str, str] = {}


#: Those that the index of a model holds under the same names.
SHOWN = tuple(field for field in ModelFacts.__struct_fields__ if field != "roles")


def read(folder: Path, entrypoint: str, listing: Sequence[Listing]) -> ModelFacts:
    """Return what the files of *listing*, which lie in *folder*, tell."""
    from reconciler.core import roles  # a plan needs none of it

    headers = {one.path: _header(folder / one.path) for one in listing}
    first = headers.get(entrypoint)
    known = {path: roles.of_header(first) if first and path == entrypoint else roles.infer(path, facts) for path, facts in headers.items()}
    found = _of_gguf(first, entrypoint, headers) if first else _of_configuration(folder, listing)
    return structs.replace(found, roles=known)


def _of_gguf(facts: GgufFacts, entrypoint: str, headers: Mapping[str, GgufFacts | None]) -> ModelFacts:
    from reconciler.core import roles

    parts = [headers[path] for path in roles.split_set(entrypoint, headers)]
    parameters = sum(part.parameters for part in parts if part)
    return ModelFacts(
        context_length=facts.context_length or None,
        quantization=None if facts.quantisation == "unknown" else facts.quantisation,
        parameters=parameters or None,
        architecture=facts.architecture or None,
        embedding_length=facts.embedding_length or None,
        chat_template=facts.chat_template or any(path.endswith(".jinja") for path in headers),
    )


def _header(path: Path) -> GgufFacts | None:
    from reconciler.core import gguf  # a plan needs none of it

    try:
        with path.open("rb", buffering=0) as file:
            if file.read(len(gguf.MAGIC)) != gguf.MAGIC:
                return None
        return gguf.check(path)
    except (OSError, gguf.Malformed):
        return None


def _of_configuration(folder: Path, listing: Sequence[Listing]) -> ModelFacts:
    """Return what the files of a folder in the layout of Hugging Face's libraries tell."""
    names = {one.path for one in listing}
    config = _json(folder, "config.json", names)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return ModelFacts(
        context_length=_first(config, int, "max_position_embeddings", "n_positions", "max_seq_len"),
        quantization=method if isinstance(method, str) else _first(config, str, "dtype", "torch_dtype"),
        parameters=sum(_weights(folder / name) for name in names if name.endswith(".safetensors")) or None,
        architecture=_first(config, str, "model_type"),
        embedding_length=_first(config, int, "hidden_size", "n_embd", "d_model"),
        chat_template="chat_template.jinja" in names or "chat_template" in _json(folder, "tokenizer_config.json", names),
    )


def _first(config: dict[str, Any], kind: type, *keys: str) -> Any:
    return next((value for key in keys if isinstance(value := config.get(key), kind) and not isinstance(value, bool)), None)


def _json(folder: Path, name: str, names: set[str]) -> dict[str, Any]:
    if name not in names:
        return {}
    try:
        with (folder / name).open("rb") as file:
            found = msgspec.json.decode(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _weights(path: Path) -> int:
    """Return how many numbers a safetensors file holds, by its header; 0 where it cannot be read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = msgspec.json.decode(file.read(length)) if length <= _MOST_BYTES else {}
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        return sum(math.prod(int(side) for side in shape) for shape in shapes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError):
        return 0
