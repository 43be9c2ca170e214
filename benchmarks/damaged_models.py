"""
Changes a model in known ways, for ``benchmarks.known_answers``: what a broken file, conversion, quantisation or driver may do to it.

Rules that hold here:

1. A change is made to a copy, which is a whole GGUF file again: header, tokenizer and all other tensors stay as they are.
2. Noise and weights that are drawn anew follow from the tensor's name, so that the same damage is the same bytes everywhere.
3. A changed tensor that no longer fits its quantisation is stored as float16, or as 32-bit floats if it was: that alone changes next to
   nothing, and one variant changes nothing else, for comparison.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from msgspec import Struct


class Tensor(NamedTuple):
    """A tensor as it lies in the file: its bytes, one row after the other, and how they are quantised."""

    data: Any
    kind: gguf.GGMLQuantizationType


#: Tensors by their names.
Tensors = dict[str, Tensor]


class Damage(Struct, frozen=True, kw_only=True):
    """A change, and its name in a table: *change* alters the tensors, *rope_base* is what the header's is multiplied with."""

    name: str
    change: Callable[[Tensors], None] = lambda _: None
    rope_base: float = 1.0


class Source:
    """The model at *path*, opened once: reading the header of one with many tokens takes long."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.tensors = {one.name: Tensor(one.data, one.tensor_type) for one in reader.tensors}
        self.layers = 1 + max(int(found[1]) for name in self.tensors if (found := re.match(r"blk\.(\d+)\.", name)))
        self.alignment = reader.alignment
        #: The header up to where the tensors are described; what is in it stays.
        self.header = bytearray(path.read_bytes()[: reader.tensors[0].field.offset])
        base = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.rope.freq_base")
        #: Where in the header the RoPE base is, a 32-bit float; 0: nowhere.
        self.rope_base = base.offset + sum(part.nbytes for part in base.parts[:-1]) if base else 0


def damages(source: Source) -> Iterator[Damage]:
    """Yield the damages that are tried on the model *source*, those of a kind by their size."""
    middle = source.layers // 2
    tensor = f"blk.{middle}.ffn_down.weight"
    yield Damage(name="none, for comparison")
    yield Damage(name=f"{tensor} stored as float16, for comparison", change=_noise(tensor, 0.0))
    for part in (0, 64, 16, 4, 2, 1):
        many = f"1/{part}" if part > 1 else "all" if part else "one"
        yield Damage(name=f"{many} of the rows of {tensor} zeroed", change=_zeros(tensor, part))
    for size in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        yield Damage(name=f"noise of {size} standard deviations in {tensor}", change=_noise(tensor, size))
    for size in (0.003, 0.01, 0.03, 0.1, 0.3):
        yield Damage(name=f"noise of {size} standard deviations in all matrices of all layers", change=_noise("blk.", size))
    for one, other in dict.fromkeys(((middle, middle + 1), (0, 1), (0, source.layers - 1))):
        if one < other < source.layers:
            yield Damage(name=f"layers {one} and {other} swapped", change=_swap(one, other))
    for kind in ("Q8_0", "Q5_0", "Q4_0"):
        yield Damage(name=f"all matrices of all layers quantised again, as {kind}", change=_quantised("blk.", kind))
    yield Damage(name="all matrices quantised again, as Q4_0, embeddings too", change=_quantised("", "Q4_0"))
    for factor in (1.01, 1.1, 2.0, 10.0, 0.01) if source.rope_base else ():
        yield Damage(name=f"RoPE base times {factor}", rope_base=factor)
    yield Damage(name="another model of the same shape: all matrices of all layers drawn anew", change=_drawn_anew)


def write(source: Source, target: Path, damage: Damage) -> None:
    """Write the model *source* with *damage* to *target*, by the layout of GGUF version 3."""
    tensors, header = dict(source.tensors), bytearray(source.header)
    damage.change(tensors)
    if damage.rope_base != 1.0:
        (before,) = struct.unpack_from("<f", header, source.rope_base)
        struct.pack_into("<f", header, source.rope_base, before * damage.rope_base)
    offset = 0
    for name, one in tensors.items():
        shape = one.data.shape if one.data.dtype != np.uint8 else gguf.quant_shape_from_byte_shape(one.data.shape, one.kind)
        header += struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", one.kind, offset)
        offset += _padded(one.data.nbytes, source.alignment)
    with target.open("wb") as out:
        out.write(header.ljust(_padded(len(header), source.alignment), b"\0"))
        for one in tensors.values():
            out.write(one.data.tobytes().ljust(_padded(one.data.nbytes, source.alignment), b"\0"))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


# -- the changes -------------------------------------------------------------------------------------


def _zeros(name: str, part: int) -> Callable[[Tensors], None]:
    """Zero the first of *part* parts of the rows of tensor *name*; of 0 parts: one row."""

    def change(tensors: Tensors) -> None:
        data = np.array(tensors[name].data)
        data[: max(1, len(data) // part) if part else 1] = 0  # a block of zeros is zero in every quantisation
        tensors[name] = tensors[name]._replace(data=data)

    return change


def _noise(prefix: str, size: float) -> Callable[[Tensors], None]:
    """Add noise of *size* standard deviations of the tensor itself to each matrix whose name begins with *prefix*."""

    def change(tensors: Tensors) -> None:
        for name in _matrices(tensors, prefix):
            values = _values(tensors[name])
            noise = _drawn(name).standard_normal(values.shape, dtype=np.float32) * np.float32(size * values.std())
            tensors[name] = Tensor((values + noise).astype(np.float16), gguf.GGMLQuantizationType.F16)

    return change


def _swap(one: int, other: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"blk.{one}.")]:
            beside = name.replace(f"blk.{one}.", f"blk.{other}.", 1)
            tensors[name], tensors[beside] = tensors[beside], tensors[name]

    return change


def _quantised(prefix: str, kind: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        chosen = gguf.GGMLQuantizationType[kind]
        for name in _matrices(tensors, prefix):
            tensors[name] = Tensor(gguf.quants.quantize(_values(tensors[name]), chosen), chosen)

    return change


def _drawn_anew(tensors: Tensors) -> None:
    for name in _matrices(tensors, "blk."):
        values = _values(tensors[name])
        drawn = _drawn(name).standard_normal(values.shape, dtype=np.float32) * values.std()
        tensors[name] = Tensor(drawn.astype(np.float16), gguf.GGMLQuantizationType.F16)


def _matrices(tensors: Tensors, prefix: str) -> list[str]:
    """Return the names of the matrices that begin with *prefix*: norms and biases are vectors, and are left as they are."""
    return [name for name, one in tensors.items() if name.startswith(prefix) and one.data.ndim > 1]


def _values(tensor: Tensor) -> Any:
    return gguf.quants.dequantize(tensor.data, tensor.kind).astype(np.float32)


def _drawn(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))
