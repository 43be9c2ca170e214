"""
What of a GGUF header decides how much memory its model takes: sizes of weights by layer, and the widths of what is computed from them.

Rules that hold here:

1. Nothing is read but a header that was checked (``gguf``), and nothing that it claims leads to more work than its own list of tensors.
2. A key that an architecture does not have counts as what llama.cpp takes for it. What a header leaves out of both is zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from msgspec import Struct

_LAYER = re.compile(r"blk\.([0-9]{1,9})\.")
#: Tensors that llama.cpp keeps with the input, in main memory, and with the output, on the device of the last layer.
_INPUT = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")
#: Architectures that only encode: no token is generated, and nothing is cached.
_ENCODERS = {
    "bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "neo-bert", "modern-bert", "eurobert", "t5encoder",
}  # fmt: skip


class Sized(Protocol):
    """A tensor of a header: its name, its elements and its bytes."""

    @property
    def name(self) -> str: ...  # noqa: D102  the class says it
    @property
    def elements(self) -> int: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102


class ModelShape(Struct, frozen=True, kw_only=True):
    """Sizes of a model; bytes of weights, and numbers of components."""

    layer_bytes: tuple[int, ...] = ()  #: Weights of each layer.
    input_bytes: int = 0  #: Weights of the embedding of tokens.
    output_bytes: int = 0  #: Weights after the last layer; where the output is the embedding itself, that of it is ``input_bytes``.
    tied: bool = False  #: Whether the output layer is the embedding.
    width: int = 0  #: Components of a token's state.
    vocabulary: int = 0  #: Tokens.
    heads: int = 0  #: Heads of a layer, the most.
    keys: tuple[int, ...] = ()  #: Components of a token's cached key, for each layer; 0 where a layer has no attention.
    values: tuple[int, ...] = ()  #: The same of its value.
    feed_forward: int = 0  #: Components between the two halves of a layer, the most, for each expert that is used.
    experts_used: int = 1  #: Experts that one token is given to.
    encoder: bool = False  #: Whether it caches nothing.
    embedding: bool = False  #: Whether it gives one vector for a text.


def of_header(architecture: str, keys: Mapping[str, Any], tensors: Iterable[Sized], *, embedding: bool) -> ModelShape:
    """Return the shape of the model whose header has *keys* and *tensors*."""
    found = tuple(tensors)
    get = _Keys(architecture, keys)
    blocks, width = get.number("block_count"), get.number("embedding_length")
    layers = [0] * blocks
    entry = last = 0
    names = set()
    for tensor in found:
        names.add(tensor.name)
        layer = _LAYER.match(tensor.name)
        if layer and int(layer[1]) < blocks:
            layers[int(layer[1])] += tensor.size
        elif tensor.name.startswith(_INPUT):
            entry += tensor.size
        else:
            last += tensor.size
    heads = get.each("attention.head_count", blocks, 0)
    shared = get.each("attention.head_count_kv", blocks, None)
    per_head = [width // count if count else 0 for count in heads]
    key, value = (get.number(f"attention.{part}_length") for part in ("key", "value"))
    counts = [head if own is None else own for head, own in zip(heads, shared, strict=True)]
    encoder = architecture in _ENCODERS or keys.get(f"{architecture}.attention.causal") is False
    used = max(1, get.number("expert_used_count"))
    wide = max(get.each("feed_forward_length", blocks, 0), default=0)
    return ModelShape(
        layer_bytes=tuple(layers),
        input_bytes=entry,
        output_bytes=last,
        tied=not encoder and "output.weight" not in names and "token_embd.weight" in names,
        width=width,
        vocabulary=_vocabulary(keys, found, width),
        heads=max(heads, default=0),
        keys=tuple(count * (key or each) for count, each in zip(counts, per_head, strict=True)),
        values=tuple(count * (value or each) for count, each in zip(counts, per_head, strict=True)),
        feed_forward=(get.number("expert_feed_forward_length") or wide) if get.number("expert_count") else wide,
        experts_used=used if get.number("expert_count") else 1,
        encoder=encoder,
        embedding=embedding,
    )


class _Keys:
    """The keys of one architecture: numbers, and lists that have one for each layer."""

    def __init__(self, architecture: str, keys: Mapping[str, Any]) -> None:
        self._architecture = architecture
        self._keys = keys

    def number(self, key: str) -> int:
        """Return the number, 0 where it is missing or is none; of a list the largest."""
        found = self._keys.get(f"{self._architecture}.{key}", 0)
        values = getattr(found, "values", ())
        return max(values, default=0) if values else found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0

    def each(self, key: str, layers: int, missing: Any) -> list[Any]:
        """Return the number for each of *layers*: of a list its own, else the same."""
        found = self._keys.get(f"{self._architecture}.{key}", missing)
        values = tuple(getattr(found, "values", ()))
        if values:
            return [max(0, int(one)) for one in (values + (0,) * layers)[:layers]]
        return [found if found is missing or not isinstance(found, int) else max(0, found)] * layers


def _vocabulary(keys: Mapping[str, Any], tensors: tuple[Sized, ...], width: int) -> int:
    listed = getattr(keys.get("tokenizer.ggml.tokens"), "count", 0)
    embedding = next((one.elements for one in tensors if one.name == "token_embd.weight"), 0)
    return int(listed) or (embedding // width if width else 0)
