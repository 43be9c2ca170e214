"""
A store of Ollama (``OLLAMA_MODELS``): a manifest for each model, and links among its blobs.

Ollama names blobs by SHA-256 alone: a model whose files the network names by another digest is left out, with the reason, and so is a
model that is no single GGUF file with its projector, adapters and template. The tag is the version, and ``latest`` the current version.
"""

from __future__ import annotations

from typing import Any

import msgspec

from reconciler.core import digest
from reconciler.serve.content import Content, Entry, Server
from reconciler.serve.served_model import ServedModel
from reconciler.store.index import IndexFile

#: Where Ollama looks for a name without a host and a namespace.
_LIBRARY = "manifests/registry.ollama.ai/library"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_CONFIG = "application/vnd.docker.container.image.v1+json"
#: Media types of layers by the role of the file.
_LAYERS = {
    "model": "application/vnd.ollama.image.model",
    "mmproj": "application/vnd.ollama.image.projector",
    "lora": "application/vnd.ollama.image.adapter",
    "licence": "application/vnd.ollama.image.license",
}


def content(server: Server, models: tuple[ServedModel, ...]) -> Content:
    """Return the blobs of *models*, then their manifests."""
    blobs, manifests, left_out = dict[str, Entry](), list[Entry](), list[str]()
    for model in models:
        if fault := _unsayable(model):
            left_out.append(f"{model.id}: {fault}")
            continue
        config = msgspec.json.encode(_config(model))
        for entry in (*(_link(model, file) for file in _files(model)), Entry(path=_blob(digest.of(config)), data=config, shared=True)):
            blobs[entry.path] = entry
        parameters = server.options.get(model.id, server.options.get(model.name, {}))
        layers = [_layer(_LAYERS[_role(model, file)], file.digest, file.size) for file in _files(model)]
        if parameters:
            data = msgspec.json.encode(parameters, order="sorted")
            blobs[_blob(digest.of(data))] = Entry(path=_blob(digest.of(data)), data=data, shared=True)
            layers.append(_layer("application/vnd.ollama.image.params", digest.of(data), len(data)))
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _layer(_CONFIG, digest.of(config), len(config)),
            "layers": layers,
        }
        for tag in (model.version, *(("latest",) if model.current else ())):
            manifests.append(Entry(path=f"{_LIBRARY}/{model.name}/{tag}", data=msgspec.json.encode(manifest)))
    return Content(entries=(*blobs.values(), *manifests), names=tuple(model.id for model in models), left_out=tuple(left_out))


def check_options(options: dict[str, Any]) -> str:
    """Return what is wrong with *options*, or an empty text."""
    found = [key for key, value in options.items() if not isinstance(value, dict)]
    return f"{found[0]!r} is no table: options are tables of Ollama's parameters by model id or name" if found else ""


def _files(model: ServedModel) -> tuple[IndexFile, ...]:
    """Return the files that are layers, the model first."""
    found = [file for file in model.files if _role(model, file) in _LAYERS]
    return tuple(sorted(found, key=lambda file: (file.path != model.entrypoint, file.path)))


def _role(model: ServedModel, file: IndexFile) -> str:
    return "model" if file.path == model.entrypoint else "" if file.role == "model" else file.role


def _unsayable(model: ServedModel) -> str:
    """Return why a manifest cannot say *model*, or an empty text."""
    if not model.entrypoint.endswith(".gguf"):
        return f"{model.entrypoint!r} is no GGUF file"
    if any(file.role == "split" for file in model.files):
        return "it is split in several files"
    others = [file.digest for file in _files(model) if not file.digest.startswith("sha256:")]
    return f"Ollama names blobs by SHA-256, and the network names one {others[0].partition(':')[0]}" if others else ""


def _config(model: ServedModel) -> dict[str, Any]:
    family = model.architecture or "unknown"
    return {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": f"{model.parameters / 1e6:.2f}M" if model.parameters < 10**9 else f"{model.parameters / 1e9:.1f}B",
        "file_type": model.quantization or "unknown",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [file.digest for file in _files(model)]},
    }


def _link(model: ServedModel, file: IndexFile) -> Entry:
    return Entry(path=_blob(file.digest), target=model.path(file.path), shared=True)


def _layer(kind: str, name: str, size: int) -> dict[str, Any]:
    return {"mediaType": kind, "digest": name, "size": size}


def _blob(name: str) -> str:
    return f"blobs/{name.replace(':', '-')}"
