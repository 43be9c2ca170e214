"""
Checks a GGUF file's header before any engine reads it (ggml's gguf.md, versions 2 and 3).

Engines abort on some malformed headers and read past the end on others, and their fixes were bypassed within months. What is plainly
malformed is refused here, in a memory-safe language, with a message that says where. That does not prove that an engine is safe with
the rest: test jobs run in a sandbox.

Rules that hold here:

1. Every length is checked against what is left of the file before anything is read; what is not needed is skipped.
2. Memory is bounded by one window of the file and the list of tensors, time by the caps below.
3. Of a tensor type that is not known here, only the position is checked.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any

from msgspec import Struct

from reconciler.core import file_type, model_shape
from reconciler.core.model_shape import ModelShape

MAGIC = file_type.GGUF_MAGIC
MAX_KEYS = 65_536
MAX_TENSORS = 1_000_000
MAX_STRING = 64 << 20
MAX_KEY, MAX_NAME = 1_024, 127  # of a name GGML_MAX_NAME, as some builds raise it
MAX_STRINGS = 8_000_000  # elements of an array of strings; vocabularies have 300,000
MAX_LAYERS = 512  # llama.cpp's own bound, LLAMA_MAX_LAYERS: it aborts past it
MAX_CONTEXT = 1 << 26  # a claim of 2^31 hung the loader; the longest in use are 10 million

_WINDOW, _KEPT = 1 << 20, 256  # bytes of the file in memory, and of a value that are kept
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZES = {kind: struct.calcsize("<" + code) for kind, code in _SCALARS.items()}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _MAX_TYPE = 4, 5, 6, 7, 8, 9, 255

#: Elements and bytes of a block, by ggml type: f32, f16, the quantised ones, integers, f64, bf16.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 10: (256, 84), 11: (256, 110),
    12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50),
    20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip

#: Names of ``general.file_type``, for people.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L",
    14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip


class Malformed(ValueError):
    """The file is not a sound GGUF file; the message says where."""


class GgufFacts(Struct, frozen=True, kw_only=True):
    """What a header tells about its model."""

    version: int
    #: Empty in the second and later parts of a split model, whose first part says it.
    architecture: str
    name: str
    context_length: int
    embedding_length: int
    block_count: int
    quantisation: str
    parameters: int
    chat_template: bool
    embedding: bool
    tensor_bytes: int
    #: How pooling turns token vectors into one: ``mean``, ``cls``, ``last``, ``rank``, ``none``; empty where the header says nothing.
    pooling: str = ""
    #: Parts of a split model; 1: it is whole.
    parts: int = 1
    part: int = 1  #: Which of them it is, from 1.
    shape: ModelShape = ModelShape()  #: What decides how much memory it takes.
    kind: str = ""  #: ``general.type``: ``model``, ``adapter``, ``mmproj``, ``imatrix``; empty where the header says nothing.


class _List(Struct, frozen=True):
    """An array of a header: what its elements are and how many."""

    kind: int
    count: int
    #: Whole numbers of a list that may have one for each layer; empty for others.
    values: tuple[int, ...] = ()


class _Tensor(Struct, frozen=True):
    name: str
    elements: int
    offset: int
    #: Bytes; for a type that is not known here, one.
    size: int


def check(path: Path) -> GgufFacts:
    """
    Check the file at *path* and return what its header tells.

    Raises:
        Malformed: it breaks a rule; the message names the offset, the key or the tensor.
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        seen = os.fstat(fd)
        if not stat.S_ISREG(seen.st_mode):
            raise Malformed("not a plain file")
        kind = file_type.identify(os.pread(fd, file_type.HEAD_BYTES, 0), seen.st_size)
        if kind.name not in {"gguf", "unknown"}:
            raise Malformed(f"it is {kind.text}{'; ' if kind.hint else ''}{kind.hint}")
        return _facts(_Reader(fd, seen.st_size))
    finally:
        os.close(fd)


def _facts(reader: _Reader) -> GgufFacts:
    """Walk the header from front to back."""
    version, tensors, keys = _counts(reader)
    found = _keys(reader, keys)
    alignment = _alignment(found)
    found_tensors = [_tensor(reader, index, alignment) for index in range(tensors)]
    start = -(-reader.offset // alignment) * alignment
    _check_places(found_tensors, start, reader.size)
    _check_vocabulary(found)
    return _facts_of(version, found, found_tensors)


def _counts(reader: _Reader) -> tuple[int, int, int]:
    if reader.take(4, "the magic") != MAGIC:
        raise Malformed("it does not begin with the magic GGUF")
    if (version := reader.number("I", "the version")) not in {2, 3}:
        raise Malformed(f"version {version} is not known; 2 and 3 are")
    tensors, keys = reader.number("q", "the number of tensors"), reader.number("q", "the number of keys")
    if not 0 <= tensors <= MAX_TENSORS:
        raise Malformed(f"it claims {tensors:,} tensors, not from 0 to {MAX_TENSORS:,}")
    if not 0 <= keys <= MAX_KEYS:
        raise Malformed(f"it claims {keys:,} keys, not from 0 to {MAX_KEYS:,}")
    return version, tensors, keys


# -- the file from front to back -------------------------------------------------------------------


class _Reader:
    """A file's bytes in order, one window of them in memory. No read goes past the end; a file that shrinks meanwhile is malformed."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self._fd = fd
        self._window = b""
        self._base = 0  # the window's place in the file
        self._at = 0  # ours in the window

    @property
    def offset(self) -> int:
        return self._base + self._at

    def number(self, code: str, where: str) -> Any:
        length = struct.calcsize("<" + code)
        self._fill(length, where)
        self._at += length
        return struct.unpack_from("<" + code, self._window, self._at - length)[0]

    def take(self, length: int, where: str) -> bytes:
        self._fill(length, where)
        self._at += length
        return self._window[self._at - length : self._at]

    def skip(self, length: int, where: str) -> None:
        self._refuse_past_end(length, where)
        self._at += length

    def string(self, most: int, where: str) -> str:
        """Return the first bytes of a string and skip the rest of it."""
        length = self.number("Q", f"the length of {where}")
        if length > most:
            raise Malformed(f"{where} claims {length:,} bytes at offset {self.offset:,}, more than {most:,}")
        self._refuse_past_end(length, where)
        kept = self.take(min(length, max(_KEPT, MAX_KEY)), where)
        self.skip(length - len(kept), where)
        return kept.decode(errors="replace")

    def skip_strings(self, count: int, where: str) -> None:
        """Pass over *count* strings. Written for speed: a vocabulary has hundreds of thousands of them."""
        unpack = struct.Struct("<Q").unpack_from
        window, at, end = self._window, self._at, len(self._window)
        for _ in range(count):
            if at + 8 > end:
                self._at = at
                self._fill(8, where)
                window, at, end = self._window, self._at, len(self._window)
            length = unpack(window, at)[0]
            at += 8
            if at + length > end:
                self._at = at
                if length > MAX_STRING:
                    raise Malformed(f"a string in {where} claims {length:,} bytes at offset {self.offset:,}, more than {MAX_STRING:,}")
                self._refuse_past_end(length, where)
            at += length
        self._at = at

    def _fill(self, length: int, where: str) -> None:
        """Read the next *length* bytes, which are never many, into the window."""
        if self._at + length <= len(self._window):
            return
        self._refuse_past_end(length, where)
        self._base, self._at = self.offset, 0
        self._window = os.pread(self._fd, max(_WINDOW, length), self._base)
        if len(self._window) < length:
            raise Malformed(f"{where} at offset {self.offset:,} reaches past the end of the file, which shrank")

    def _refuse_past_end(self, length: int, where: str) -> None:
        if length > self.size - self.offset:
            raise Malformed(f"{where} at offset {self.offset:,} reaches past the end of the file, at {self.size:,}")


# -- keys ------------------------------------------------------------------------------------------


def _keys(reader: _Reader, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index in range(count):
        at = reader.offset
        key = reader.string(MAX_KEY, f"the name of key {index}")
        if not key:
            raise Malformed(f"key {index} at offset {at:,} has no name")
        if key in found:
            raise Malformed(f"the key {key[:80]!r} is there twice, again at offset {at:,}")
        kind = reader.number("I", f"the type of {key[:80]!r}")
        found[key] = _value(reader, kind, key[:80])
    return found


def _value(reader: _Reader, kind: int, key: str) -> Any:
    if kind == _BOOL and (octet := reader.take(1, f"the value of {key!r}")[0]) > 1:
        raise Malformed(f"{key!r} is {octet}, neither true nor false")
    if kind == _BOOL:
        return bool(octet)
    if kind in _SCALARS:
        return reader.number(_SCALARS[kind], f"the value of {key!r}")
    if kind == _STRING:
        return reader.string(MAX_STRING, f"the value of {key!r}")[:_KEPT]
    if kind == _ARRAY:
        return _array(reader, key)
    raise Malformed(f"{key!r} has the type {kind}, which does not exist")


def _array(reader: _Reader, key: str) -> _List:
    kind, count = reader.number("I", f"the element type of {key!r}"), reader.number("Q", f"the length of {key!r}")
    if kind not in _SCALARS and kind != _STRING:  # arrays of arrays are in no file that an engine reads
        raise Malformed(f"the array {key!r} has elements of the type {kind}, which is not known here")
    least = _SIZES.get(kind, 8)
    if count * least > reader.size - reader.offset or (kind == _STRING and count > MAX_STRINGS):
        raise Malformed(f"the array {key!r} claims {count:,} elements at offset {reader.offset:,}, more than it can have")
    if kind == _STRING:
        reader.skip_strings(count, repr(key))
    elif count <= MAX_LAYERS and kind in {_INT32, _UINT32}:
        return _List(kind, count, struct.unpack(f"<{count}{_SCALARS[kind]}", reader.take(count * least, f"the array {key!r}")))
    else:
        reader.skip(count * least, f"the array {key!r}")
    return _List(kind, count)


def _alignment(keys: dict[str, Any]) -> int:
    found = keys.get("general.alignment", 32)
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= 65_536 or found & (found - 1):
        raise Malformed(f"general.alignment is {found!r}, not a power of two up to 65,536")
    return found


def _check_vocabulary(keys: dict[str, Any]) -> None:
    """Refuse lists beside the vocabulary that are of another length or type: engines index them by token without looking."""
    tokens = keys.get("tokenizer.ggml.tokens")
    if tokens is not None and not (isinstance(tokens, _List) and tokens.kind == _STRING):
        raise Malformed("tokenizer.ggml.tokens is not a list of strings")
    for key, kinds in (("tokenizer.ggml.scores", {_FLOAT32}), ("tokenizer.ggml.token_type", {_INT32, _UINT32})):
        beside = keys.get(key)
        if beside is None:
            continue
        if not isinstance(beside, _List) or beside.kind not in kinds:
            raise Malformed(f"{key} is not a list of 32-bit numbers of its kind")
        if tokens is None or beside.count != tokens.count:
            raise Malformed(f"{key} has {beside.count:,} elements for {tokens.count if tokens else 0:,} tokens")


# -- tensors ---------------------------------------------------------------------------------------


def _tensor(reader: _Reader, index: int, alignment: int) -> _Tensor:
    name = reader.string(MAX_NAME, f"the name of tensor {index}")
    shown = name[:80]
    dimensions = reader.number("I", f"the number of dimensions of tensor {shown!r}")
    if not 1 <= dimensions <= 4:
        raise Malformed(f"tensor {shown!r} has {dimensions:,} dimensions, not 1 to 4")
    shape = [reader.number("q", f"a dimension of tensor {shown!r}") for _ in range(dimensions)]
    if any(side <= 0 for side in shape):
        raise Malformed(f"tensor {shown!r} has the dimensions {shape}")
    kind = reader.number("I", f"the type of tensor {shown!r}")
    if kind > _MAX_TYPE:
        raise Malformed(f"tensor {shown!r} has the type {kind:,}, which does not exist")
    offset = reader.number("Q", f"the offset of tensor {shown!r}")
    if offset % alignment:
        raise Malformed(f"tensor {shown!r} begins at {offset:,}, which is not a multiple of {alignment}")
    elements = math.prod(shape)
    return _Tensor(name, elements, offset, _bytes(shown, shape[0], elements, kind))


def _bytes(name: str, row: int, elements: int, kind: int) -> int:
    packed, size = _BLOCKS.get(kind, (1, 0))
    if row % packed:
        raise Malformed(f"tensor {name!r} has rows of {row:,}, which its type packs by {packed}")
    return elements // packed * size or 1


def _check_places(found_tensors: list[_Tensor], start: int, size: int) -> None:
    names: set[str] = set()
    end, before = 0, ""
    for tensor in sorted(found_tensors, key=lambda one: one.offset):
        shown = tensor.name[:80]
        if tensor.name in names:
            raise Malformed(f"tensor {shown!r} is there twice")
        names.add(tensor.name)
        if tensor.offset < end:
            raise Malformed(f"tensor {shown!r} at {tensor.offset:,} overlaps {before!r}, which ends at {end:,}")
        end, before = tensor.offset + tensor.size, shown
        if start + end > size:
            raise Malformed(f"tensor {shown!r} reaches to byte {start + end:,} of a file with {size:,}: it is not whole")


# -- facts -----------------------------------------------------------------------------------------

_LAYER = re.compile(r"blk\.([0-9]{1,9})\.")
_POOLING = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}


def _facts_of(version: int, keys: dict[str, Any], found_tensors: list[_Tensor]) -> GgufFacts:
    architecture, parts = _architecture(keys), max(1, _whole(keys, "split.count"))
    blocks = _whole(keys, f"{architecture}.block_count")
    _check_blocks(f"{architecture}.block_count", blocks, found_tensors, whole=parts == 1)
    width, context = _whole(keys, f"{architecture}.embedding_length"), _whole(keys, f"{architecture}.context_length")
    if context > MAX_CONTEXT:
        raise Malformed(f"{architecture}.context_length is {context:,}, more than {MAX_CONTEXT:,}")
    pooling = _POOLING.get(_whole(keys, f"{architecture}.pooling_type"), "unknown") if f"{architecture}.pooling_type" in keys else ""
    embedding = pooling not in {"", "none", "rank"}
    return GgufFacts(
        version=version,
        architecture=architecture,
        name=str(keys.get("general.name", ""))[:256],
        context_length=context,
        embedding_length=width,
        block_count=blocks,
        quantisation=FILE_TYPES.get(_whole(keys, "general.file_type"), "unknown") if "general.file_type" in keys else "unknown",
        parameters=sum(tensor.elements for tensor in found_tensors),
        chat_template="tokenizer.chat_template" in keys,
        embedding=embedding,
        shape=model_shape.of_header(architecture, keys, found_tensors, embedding=embedding),
        tensor_bytes=sum(tensor.size for tensor in found_tensors),
        pooling=pooling,
        parts=parts,
        part=_whole(keys, "split.no") + 1,
        kind=str(keys.get("general.type", ""))[:64],
    )


def _architecture(keys: dict[str, Any]) -> str:
    found = keys.get("general.architecture", "")
    if not found and _whole(keys, "split.no"):
        return ""
    if not isinstance(found, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,63}", found):
        raise Malformed("general.architecture is missing" if not found else f"general.architecture is {found!r}, which names none"[:200])
    return found


def _check_blocks(key: str, claimed: int, found_tensors: list[_Tensor], *, whole: bool) -> None:
    """Refuse more layers than an engine takes, than there are tensors for, or fewer than tensors name."""
    if claimed > MAX_LAYERS:
        raise Malformed(f"{key} is {claimed:,}, more than {MAX_LAYERS}")
    if whole and found_tensors and claimed > len(found_tensors):
        raise Malformed(f"{key} is {claimed:,}, and the file has only {len(found_tensors):,} tensors")
    layers = [int(found[1]) for tensor in found_tensors if (found := _LAYER.match(tensor.name))]
    if claimed and layers and max(layers) >= claimed:
        raise Malformed(f"{key} is {claimed:,}, and a tensor is named for layer {max(layers):,}")


def _whole(keys: dict[str, Any], key: str) -> int:
    found = keys.get(key, 0)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise Malformed(f"{key} is {found!r}, not a whole number"[:200])
    return found
