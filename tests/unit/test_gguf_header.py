"""What a sound header tells, and every lie that is caught before an engine sees it."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from reconciler.core import gguf
from tests import gguf_files as files

LIES = tuple(files.lies())


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("make", "said"), [(make, said) for _, make, said in LIES], ids=[name for name, _, _ in LIES])
def test_a_lie_is_refused_and_its_place_named(tmp_path: Path, make: Callable[[], bytes], said: str) -> None:
    with pytest.raises(gguf.Malformed) as refused:
        gguf.check(written(tmp_path / "model.gguf", make()))
    assert said in str(refused.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    for length, data in files.truncations():
        with pytest.raises(gguf.Malformed):
            gguf.check(written(tmp_path / f"{length}.gguf", data))


def test_any_flipped_byte_of_a_header_is_refused_or_read_and_never_anything_else(tmp_path: Path) -> None:
    sound, header = files.whole().encode(), len(files.whole().header())
    path = tmp_path / "model.gguf"
    refused = 0
    for at in range(0, header, 3):
        data = bytearray(sound)
        data[at] ^= 0xFF
        try:
            gguf.check(written(path, bytes(data)))
        except gguf.Malformed:
            refused += 1
    assert refused > header // 3 // 4  # text and numbers without a rule may change; lengths, counts and types may not


def test_a_sound_file_tells_what_it_is(tmp_path: Path) -> None:
    found = gguf.check(written(tmp_path / "model.gguf", files.whole(template="{{ messages }}").encode()))
    assert (found.architecture, found.name, found.block_count, found.context_length) == ("llama", "tiny", 1, 256)
    assert found.parameters == 2 * 4 * 259 + 4 * 16 + 3 * 4 + 3 * 32
    assert found.tensor_bytes == 4 * found.parameters
    assert (found.quantisation, found.chat_template, found.embedding, found.parts) == ("F32", True, False, 1)
    assert sum(found.shape.layer_bytes) + found.shape.input_bytes + found.shape.output_bytes == found.tensor_bytes


@pytest.mark.parametrize(("number", "pooling", "embedding"), [(1, "mean", True), (2, "cls", True), (3, "last", True), (4, "rank", False)])
def test_pooling_makes_an_embedding_model(tmp_path: Path, number: int, pooling: str, embedding: bool) -> None:
    found = gguf.check(written(tmp_path / "model.gguf", files.whole(pooling=number).encode()))
    assert (found.pooling, found.embedding) == (pooling, embedding)


def test_bytes_after_the_last_tensor_are_the_hashs_business(tmp_path: Path) -> None:
    data = files.whole().encode() + bytes(100)
    assert gguf.check(written(tmp_path / "model.gguf", data)).architecture == "llama"


def test_a_tensor_type_of_tomorrow_is_left_to_the_engine(tmp_path: Path) -> None:
    sketch = files.whole().with_tensor("blk.0.attn_q.weight", kind=99)
    assert gguf.check(written(tmp_path / "model.gguf", sketch.encode())).architecture == "llama"


def test_a_later_part_of_a_split_model_needs_no_architecture(tmp_path: Path) -> None:
    sketch = files.Sketch(keys=(("split.no", files.UINT32, 1), ("split.count", files.UINT32, 3)), tensors=files.whole().tensors)
    found = gguf.check(written(tmp_path / "model-00002-of-00003.gguf", sketch.encode()))
    assert (found.architecture, found.parts) == ("", 3)


def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(written(tmp_path / "model.gguf", files.whole().encode()))
    with pytest.raises(gguf.Malformed, match="plain file"):
        gguf.check(tmp_path / "fifo")
    with pytest.raises(gguf.Malformed, match="plain file"):
        gguf.check(tmp_path)
    with pytest.raises(OSError, match="link"):
        gguf.check(tmp_path / "link")


def test_memory_is_flat_whatever_the_header_claims(tmp_path: Path) -> None:
    vocabulary = [f"token-{number:06}" for number in range(150_000)]
    sketch = files.whole(template="x" * (8 << 20)).with_key("tokenizer.ggml.merges", files.ARRAY, (files.STRING, vocabulary))
    path = written(tmp_path / "model.gguf", sketch.encode())
    del vocabulary, sketch
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        gguf.check(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 4 << 20


def test_a_hole_of_forty_gigabytes_costs_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", files.whole().header())
    os.truncate(path, 40 << 30)
    assert gguf.check(path).architecture == "llama"


def test_the_sizes_of_types_are_those_of_the_reference() -> None:
    reference = pytest.importorskip("gguf", reason="the package gguf, which writes the demo's models, is not installed")
    differing = {int(kind) for kind, sizes in reference.GGML_QUANT_SIZES.items() if gguf._BLOCKS.get(int(kind), sizes) != sizes}
    assert differing <= {9}  # q8_1 is never stored in a file, and the two disagree about its sums
