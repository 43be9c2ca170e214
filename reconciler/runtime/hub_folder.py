"""
Checks a model in the layout of Hugging Face's hub (``config.json`` beside safetensors files) before a server opens it.

Rules that hold here:

1. Nothing is loaded: headers are read as JSON, and sizes are compared with what they say.
2. A file that is a Python pickle fails the model, whatever its name is and whether or not the server would open it: what is active is
   served by programs that no sandbox confines, and loading a pickle runs what is in it.
3. A file that is no safetensors file, is cut short, or is missing fails the model with its name, so that no server need find it out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reconciler.core import file_type
from reconciler.runtime.result import BadModel, CannotTest

_HEADER_BYTES = 100 << 20  # as the format's own reader allows
_JSON_BYTES = 64 << 20
_SENTENCES = "sentence_bert_config.json"
_PICKLES = {"pickle", "pytorch"}
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8,
         "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "C64": 64}  # fmt: skip


def check(folder: Path) -> dict[str, Any]:
    """
    Check the files in *folder* and return what its ``config.json`` says; an empty document where it has none.

    ``max_seq_length`` of sentence-transformers' own file is added, since servers of embeddings take no longer texts than it says.

    Raises:
        BadModel: a file is a pickle, cut short, missing, or not what its name says; the message names it.
        CannotTest: one cannot be read.
    """
    try:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            _check_file(path, path.relative_to(folder).as_posix())
        config, sentences = (_document(path) if path.exists() else {} for path in (folder / "config.json", folder / _SENTENCES))
        return config | {key: value for key, value in sentences.items() if key == "max_seq_length"}
    except OSError as error:
        raise CannotTest(f"the model's files cannot be read: {error.strerror}") from None


def context_length(config: dict[str, Any]) -> int:
    """Return how many tokens the model takes, as its configuration says it; 0 where it does not."""
    places = [place for place in (config, config.get("text_config")) if isinstance(place, dict)]
    found = [place.get(key) for place in places for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    lengths = [length for length in found if isinstance(length, int) and length > 0][:1]
    most = config.get("max_seq_length")
    return min([*lengths, most] if isinstance(most, int) and most > 0 else lengths, default=0)


def _check_file(path: Path, name: str) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        kind = file_type.identify(file.read(file_type.HEAD_BYTES), size)
    if kind.name in _PICKLES:
        raise BadModel(f"{name} is {kind.text}; publish the weights as safetensors, and leave this file out")
    if name.endswith(".safetensors"):
        _check_safetensors(path, name, size)
    elif name.endswith(".safetensors.index.json"):
        _check_shards(path, name)


def _check_safetensors(path: Path, name: str, size: int) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER_BYTES):
            raise BadModel(f"{name} is no safetensors file, or is cut short: its header has {length:,} bytes, the file {size:,}")
        header = _decoded(file.read(length), name)
    end = 0
    for tensor, told in header.items():
        if tensor != "__metadata__":
            end = max(end, _end(told, tensor, name))
    if end != size - 8 - length:
        raise BadModel(f"{name} is cut short or damaged: its tensors take {end:,} bytes, and it has {size - 8 - length:,} for them")


def _end(told: Any, tensor: str, name: str) -> int:
    """Return where the data of a tensor ends, after checking that its offsets and its shape agree."""
    try:
        first, last = told["data_offsets"]
        count = 1
        for length in told["shape"]:
            count *= length
        sound = all(isinstance(one, int) and one >= 0 for one in (first, last, count)) and first <= last
        bits = _BITS.get(told["dtype"])  # a newer type's size is not known here
    except (TypeError, KeyError, ValueError):
        sound, bits, first, last, count = False, None, 0, 0, 0
    if not sound or (bits is not None and 8 * (last - first) != bits * count):
        raise BadModel(f"{name} is no sound safetensors file: its tensor {tensor[:100]!r} has no sound shape and offsets")
    return int(last)


def _check_shards(path: Path, name: str) -> None:
    shards = _document(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise BadModel(f"{name} has no weight_map")
    for shard in sorted(set(shards.values())):
        if "/" in shard or not (path.parent / shard).is_file():
            raise BadModel(f"the model has no file {shard[:200]!r}, which {name} names")


def _document(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _JSON_BYTES:
        raise BadModel(f"{path.name} has more than {_JSON_BYTES:,} bytes")
    return _decoded(path.read_bytes(), path.name)


def _decoded(data: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadModel(f"{name} does not hold a JSON object, as it must")
    return found
