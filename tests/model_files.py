"""
What lies beside a model: split models, projectors, LoRA adapters and draft models. Tiny real GGUF files, written by the package ``gguf``.

Each goes with the model that ``tests.node.tiny`` makes: the same layers, width and vocabulary, unless a test asks for others.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from reconciler.demo import models

_PATCH, _SIDE, _VISION, _RANK = 8, 32, 16, 2


def _written(write: Callable[[Path], None]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache
def _split(seed: str, tensors: int) -> tuple[tuple[str, bytes], ...]:
    shape = models.Shape(seed=seed)

    def write(folder: Path) -> None:
        writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama", split_max_tensors=tensors)
        models._describe(writer, shape)
        models._add_tokenizer(writer, gguf)
        for name, dimensions in models._tensors(shape):
            data = models._ones(dimensions) if name.endswith("norm.weight") else models._weights(f"{seed}/{name}", dimensions)
            writer.add_tensor(name, data)
        _finish(writer)

    return tuple(_written(write).items())


def split(seed: str, tensors: int = 4) -> dict[str, bytes]:
    """Return a model in parts of so many *tensors*, by the names that engines look for."""
    return dict(_split(seed, tensors))


@functools.cache
def projector(width: int = 32, kind: str = "gemma3", *, broken: bool = False) -> bytes:
    """Return a projector that makes 4 tokens of a picture, for a model of *width*; *broken*: its weights are not numbers."""

    def weights(name: str, *shape: int) -> Any:
        return np.full(shape, np.nan, dtype=np.float32) if broken else models._weights(name, shape).astype(np.float32)

    def write(folder: Path) -> None:
        writer = gguf.GGUFWriter(folder / "mmproj.gguf", "clip")
        writer.add_type("mmproj")
        writer.add_clip_has_vision_encoder(True)
        writer.add_string("clip.projector_type", kind)
        writer.add_vision_image_size(_SIDE)
        writer.add_vision_patch_size(_PATCH)
        writer.add_vision_embedding_length(_VISION)
        writer.add_vision_feed_forward_length(2 * _VISION)
        writer.add_vision_block_count(1)
        writer.add_vision_head_count(2)
        writer.add_vision_projection_dim(width)
        writer.add_vision_attention_layernorm_eps(1e-5)
        writer.add_vision_image_mean([0.5, 0.5, 0.5])
        writer.add_vision_image_std([0.5, 0.5, 0.5])
        writer.add_vision_projector_scale_factor(2)
        patches, wide = (_SIDE // _PATCH) ** 2, 2 * _VISION
        shapes = {
            "v.patch_embd.weight": (_VISION, 3, _PATCH, _PATCH), "v.patch_embd.bias": (_VISION,),
            "v.position_embd.weight": (patches, _VISION),
            **{f"v.blk.0.attn_{part}.weight": (_VISION, _VISION) for part in ("q", "k", "v", "out")},
            **{f"v.blk.0.attn_{part}.bias": (_VISION,) for part in ("q", "k", "v", "out")},
            "v.blk.0.ffn_up.weight": (wide, _VISION), "v.blk.0.ffn_up.bias": (wide,),
            "v.blk.0.ffn_down.weight": (_VISION, wide), "v.blk.0.ffn_down.bias": (_VISION,),
            "mm.input_projection.weight": (_VISION, width),
        }  # fmt: skip
        for name, shape in shapes.items():
            writer.add_tensor(name, weights(name, *shape))
        for name in ("v.blk.0.ln1", "v.blk.0.ln2", "v.post_ln"):
            writer.add_tensor(f"{name}.weight", np.ones(_VISION, dtype=np.float32))
            writer.add_tensor(f"{name}.bias", np.zeros(_VISION, dtype=np.float32))
        writer.add_tensor("mm.soft_emb_norm.weight", np.ones(_VISION, dtype=np.float32))
        _finish(writer)

    return _written(write)["mmproj.gguf"]


@functools.cache
def lora(width: int = 32, *, scale: float = 64.0, kind: str = "lora") -> bytes:
    """Return a LoRA adapter for one matrix of a model of *width*; at this *scale* it changes what the model says."""

    def write(folder: Path) -> None:
        writer = gguf.GGUFWriter(folder / "lora.gguf", "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", kind)
        writer.add_float32("adapter.lora.alpha", scale)
        name = "blk.0.attn_output.weight"
        writer.add_tensor(f"{name}.lora_a", models._weights(f"{name}.a", (_RANK, width)).astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", models._weights(f"{name}.b", (width, _RANK)).astype(np.float32))
        _finish(writer)

    return _written(write)["lora.gguf"]
