"""
Node profiles: ``node.toml``, what one node, or one kind of node, has. ``plan --node`` plans for it on another machine, as CI does.

Rules that hold here:

1. A profile says what decides which models a node can run and hold, and which a rollout brings to it: GPUs, memory, engines with versions,
   disk, cohorts. It names no host.
2. It is written on the node from what was measured, and may be written by hand: sizes are bytes, or text such as ``24GiB``.
3. ``disk`` is what the store may fill: what is free, and what it holds already. A profile does not change while models come and go.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from reconciler.commands.context import NodeContext, measure_node
from reconciler.core import units
from reconciler.core.errors import SettingsError
from reconciler.core.fleet_plan import DescribedNode
from reconciler.core.node import Gpu, NodeFacts
from reconciler.core.text import tool_damage

Size = Annotated[int, Meta(ge=0)] | str
_MOST_BYTES = 1 << 20


class ProfileGpu(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU of a profile."""

    name: str = ""  #: As its driver names it.
    memory: Size  #: Its memory.
    driver: str = ""  #: The driver's version.


class Profile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node has, as ``node.toml`` says it."""

    schema: Literal[1] = 1  #: Version of this form.
    memory: Size = 0  #: Main memory.
    disk: Size = 0  #: What the store may fill: what is free, and what it holds already. 0: not known, and not checked.
    reserve: Size = "1GiB"  #: How much of it is never used.
    id: str = ""  #: The node's id: the plan is then that of this node alone. Empty: the profile stands for all nodes of its kind.
    cohorts: tuple[str, ...] = ()  #: The groups of nodes that it is in, for rollouts that name them.
    engines: dict[str, str] = {}  #: Installed engines with their versions.
    gpu: tuple[ProfileGpu, ...] = ()  #: Its GPUs.


def measure(context: NodeContext) -> Profile:
    """Return the profile of this machine, with the settings of *context*."""
    facts = measure_node(context)
    return Profile(
        memory=facts.memory_bytes,
        disk=facts.disk_free_bytes + _bytes_on_disk(context),
        reserve=context.policy.reserve_bytes,
        id=context.node_id,
        cohorts=context.cohorts,
        engines=facts.engines,
        gpu=tuple(ProfileGpu(name=gpu.name, memory=gpu.total_bytes, driver=gpu.driver) for gpu in facts.gpus),
    )


def _bytes_on_disk(context: NodeContext) -> int:
    """Return the bytes that the store's blobs take on the disk: everything else in it is small, or linked to them."""
    from reconciler.store import observe

    return sum(found.st_blocks * 512 for found in observe.scan(context.layout.blobs).values())


def encode(found: Profile) -> bytes:
    """Return the bytes of ``node.toml``; sizes have what they are for people beside them, and the id is a comment, see there."""
    lines = [
        "# What this node has: made by `reconcile doctor --write-profile`, for `reconcile plan --node FILE`.",
        "# Sizes are in bytes, or text such as 24GiB.",
        "schema = 1",
        _size_line("memory", found.memory, "main memory"),
        _size_line("disk", found.disk, "what the store may fill: free, and held by it already"),
        _size_line("reserve", found.reserve, "of that, never used"),
    ]
    if found.cohorts:
        lines.append(f"cohorts = [{', '.join(map(_quoted, found.cohorts))}]  # groups that rollouts name")
    if found.id:
        lines.append(f"# id = {_quoted(found.id)}  # with it, the plan is that of this node alone, and not of all nodes of its kind")
    for gpu in found.gpu:
        lines += ["", "[[gpu]]", f"name = {_quoted(gpu.name)}", _size_line("memory", gpu.memory), f"driver = {_quoted(gpu.driver)}"]
    lines += ["", "[engines]", *(f"{_quoted(name)} = {_quoted(version)}" for name, version in sorted(found.engines.items()))]
    return ("\n".join(lines) + "\n").encode()


def _size_line(key: str, size: int | str, meaning: str = "") -> str:
    shown = units.human_size(units.size(size))
    return f"{key} = {size if isinstance(size, int) else _quoted(size)}  # {shown}{', ' if meaning else ''}{meaning}"


def _quoted(text: str) -> str:
    import tomli_w

    return tomli_w.dumps({"x": text}, multiline_strings=False).removeprefix("x = ").strip()


def files(place: Path) -> tuple[Path, ...]:
    """
    Return the profiles that *place* names: itself, or, of a folder, each ``*.toml`` in it, sorted.

    Raises:
        SettingsError: a folder without any.
    """
    if not place.is_dir():
        return (place,)
    found = tuple(sorted(place.glob("*.toml")))
    if not found:
        raise SettingsError(f"{place} holds no node profile (*.toml)", hint="`reconcile doctor --write-profile FILE` writes one on a node")
    return found


def read(path: Path) -> DescribedNode:
    """
    Return the profile in the file *path*.

    Raises:
        SettingsError: it cannot be read, or is no profile; the message names it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        hint = "`reconcile doctor --write-profile FILE` writes one on a node"
        raise SettingsError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    return decode(data, path)


def decode(data: bytes, path: Path) -> DescribedNode:
    """Return the profile in *data*, the bytes of *path*; raises SettingsError."""
    try:
        found = msgspec.convert(tomllib.loads(data.decode("utf-8-sig")), Profile)
        sizes = {key: units.size(getattr(found, key)) for key in ("memory", "disk", "reserve")}
        gpus = tuple(map(_gpu, found.gpu))
    except (ValueError, msgspec.ValidationError) as error:
        cause = tool_damage(data) or str(error).replace("`$.", "`")
        hint = "its keys are schema, memory, disk, reserve, id, cohorts, [engines] and [[gpu]] with name, memory and driver"
        raise SettingsError(f"{path} is not a node profile: {cause}", hint=hint) from None
    facts = NodeFacts(
        gpus=gpus,
        memory_bytes=sizes["memory"],
        disk_total_bytes=sizes["disk"],
        disk_free_bytes=sizes["disk"],
        engines=found.engines,
        device=", ".join(gpu.name for gpu in gpus) or "cpu",
    )
    return DescribedNode(
        name=path.stem, facts=facts, reserve_bytes=sizes["reserve"], disk_known=sizes["disk"] > 0, id=found.id, cohorts=found.cohorts
    )


def _gpu(found: ProfileGpu) -> Gpu:
    size = units.size(found.memory)
    return Gpu(name=found.name, total_bytes=size, free_bytes=size, driver=found.driver)
