"""
What a test job must load: the files of a model's tree with the role of each. Runs inside the sandbox, since headers are hostile bytes.

Rules that hold here:

1. Every fault that a header or a name shows is named, with its file, before an engine is asked.
2. A file of which the network says nothing is what its header or its name says (``core.roles``); a signed role must agree with the header.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct

from reconciler.core import gguf, roles
from reconciler.runtime import result
from reconciler.runtime.result import BadModel, CannotTest


class ModelFile(Struct, frozen=True, kw_only=True):
    """A file, what it is for, and its header's facts; None for one that is no GGUF file."""

    path: str
    role: str
    facts: gguf.GgufFacts | None = None


def read(job: dict[str, Any]) -> dict[str, ModelFile]:
    """
    Return the files of the *job*'s tree by path, their headers checked.

    Raises:
        BadModel: a header is malformed, a role contradicts it, or a split is missing, misnamed or one too many.
        CannotTest: a file cannot be read.
    """
    tree, given, entrypoint = Path(job["tree"]), job["roles"], job["entrypoint"]
    paths = _paths(tree)
    headers = {path: _header(tree, path, given.get(path), entrypoint) for path in dict.fromkeys((entrypoint, *paths))}
    found = {
        path: ModelFile(path=path, role=given.get(path) or _role(path, facts, entrypoint), facts=facts) for path, facts in headers.items()
    }
    for one in found.values():
        if fault := roles.contradiction(one.role, one.facts) if one.facts else "":
            raise BadModel(f"{one.path}: {fault}")
    if found[entrypoint].facts and found[entrypoint].role not in {"model", "split"}:
        raise BadModel(f"{entrypoint}: its role is {found[entrypoint].role!r}, and an engine is given a model")
    if fault := roles.split_fault(headers, entrypoint):
        raise BadModel(fault)
    return found


def check_names(job: dict[str, Any]) -> None:
    """
    Check by their names that no part of a model in other formats than GGUF is missing or one too many.

    Raises:
        BadModel: one is; the message names it.
    """
    if fault := roles.split_fault(dict.fromkeys(_paths(Path(job["tree"]))), job["entrypoint"]):
        raise BadModel(fault)


def _paths(tree: Path) -> list[str]:
    return sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())


def _role(path: str, facts: gguf.GgufFacts | None, entrypoint: str) -> str:
    return roles.of_header(facts) if facts and path == entrypoint else roles.infer(path, facts)


def _header(tree: Path, path: str, given: str | None, entrypoint: str) -> gguf.GgufFacts | None:
    """Return the facts of a file's header; None for a file that need not be a GGUF file, and is none."""
    if path == entrypoint:
        return result.check_gguf(tree / path)
    if given == "other":
        return None
    claimed = given in {"split", "mmproj", "lora", "draft"} or (given in {None, "model"} and path.endswith(".gguf"))
    if not claimed and not _begins_as_gguf(tree / path):
        return None
    try:
        return result.check_gguf(tree / path)
    except BadModel as error:
        raise BadModel(f"{path}: {error}") from None


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(len(gguf.MAGIC)) == gguf.MAGIC
    except OSError as error:
        raise CannotTest(f"the model's file cannot be read: {error.strerror}") from None
