"""Model folders in the layout of Hugging Face's hub: safetensors files that are sound, and folders that are not."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def safetensors(tensors: dict[str, list[float]] | None = None, **header: Any) -> bytes:
    """Return a safetensors file of 32-bit floats; *header* replaces what it says of a tensor."""
    found, data = {}, b""
    for name, values in (tensors or {"weight": [0.1, 0.2, 0.3, 0.4]}).items():
        told = {"dtype": "F32", "shape": [len(values)], "data_offsets": [len(data), len(data) + 4 * len(values)]}
        data += struct.pack(f"<{len(values)}f", *values)
        found[name] = told | header
    text = json.dumps(found).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128}).encode()


def folder(place: Path, **files: bytes) -> Path:
    """Write a model's folder; each of *files* is one more, or another in the place of a sound one, its dots written as ``__``."""
    place.mkdir(parents=True, exist_ok=True)
    sound = {"config.json": CONFIG, "model.safetensors": safetensors(), "tokenizer.json": b"{}"}
    for name, data in (sound | {name.replace("__", "."): data for name, data in files.items()}).items():
        (place / name).write_bytes(data)
    return place
