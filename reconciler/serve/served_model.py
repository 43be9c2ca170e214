"""A model as servers need it: with the absolute paths of its files, in the tree itself and never through ``active``."""

from __future__ import annotations

import os

from msgspec import Struct

from reconciler.store.index import Index, IndexFile, IndexModel
from reconciler.store.layout import Layout


class ServedModel(Struct, frozen=True, kw_only=True):
    """One model of the active set."""

    id: str
    name: str
    version: str
    #: Whether its bare name leads to it.
    current: bool
    tasks: tuple[str, ...]
    #: Its folder, absolute; no swap changes what is there.
    folder: str
    #: Digest of its tree.
    tree: str
    entrypoint: str
    files: tuple[IndexFile, ...] = ()
    #: Of its header: 0 and empty where they are not known.
    context_length: int = 0
    architecture: str = ""
    quantization: str = ""
    parameters: int = 0

    def path(self, relative: str) -> str:
        """Return the absolute path of one of its files."""
        return f"{self.folder}/{relative}"

    @property
    def entrypoint_path(self) -> str:
        """The absolute path of the file that an engine is given."""
        return self.path(self.entrypoint)

    def of_role(self, role: str) -> tuple[str, ...]:
        """Return the absolute paths of its files with *role*, sorted."""
        return tuple(self.path(file.path) for file in self.files if file.role == role and file.path != self.entrypoint)

    @property
    def only_embeds(self) -> bool:
        """Whether embedding is all that it is for."""
        return self.tasks == ("embedding",)


def models_of(index: Index, layout: Layout, wanted: tuple[str, ...]) -> tuple[ServedModel, ...]:
    """Return the models of *index* that *wanted* names by id, name or task, sorted by id; all where it names none."""
    root = os.path.realpath(layout.root)
    return tuple(_served(model, f"{root}/{layout.tree_from_root(model.tree)}") for model in index.models if is_wanted(model, wanted))


def is_wanted(model: IndexModel, wanted: tuple[str, ...]) -> bool:
    """Whether *wanted* names *model*, or nothing."""
    return not wanted or not {model.id, model.id.partition(":")[0], *(f"task:{task}" for task in model.tasks)}.isdisjoint(wanted)


def _served(model: IndexModel, folder: str) -> ServedModel:
    name, _, version = model.id.partition(":")  # an index of an older version has neither
    return ServedModel(
        id=model.id,
        name=name,
        version=version,
        current=model.current,
        tasks=model.tasks,
        folder=folder,
        tree=model.tree,
        entrypoint=model.entrypoint,
        files=model.files,
        context_length=model.context_length or 0,
        architecture=model.architecture or "",
        quantization=model.quantization or "",
        parameters=model.parameters or 0,
    )
