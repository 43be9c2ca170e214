"""The command doctor: the checks of a node, and the profile of what it has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext, common_options
from reconciler.cli.options import FILE, OFFLINE

if TYPE_CHECKING:
    from rich.console import Console

_LEVELS = {"ok": ("ok     ", "green"), "warning": ("warning", "yellow"), "error": ("error  ", "bold red")}


@click.command()
@click.option(
    "--write-profile",
    "profile",
    type=FILE,
    metavar="FILE",
    help="Write what this node has to FILE, for `reconcile plan --node FILE`; no checks.",
)
@OFFLINE
@common_options()
def doctor(context: CommandContext, *, profile: Path | None, offline: bool) -> int:
    """
    Check this machine for problems and show how to fix them.

    Checks Python, aria2c, the sandbox, GPUs, engines, disk, clock, trust root, lock, store and agent, and whether sources answer.
    Changes nothing. Exit code 1 if there is an error.

    \b
      reconcile doctor
      reconcile doctor --offline --json
      reconcile doctor --write-profile nodes/gpu.toml
    """
    if profile is not None:
        return _write_profile(context, profile)
    from reconciler.commands import doctor as examining
    from reconciler.commands import doctor_live

    found = examining.examine(context.node, offline=offline, more=doctor_live.CHECKS)

    def show(to: Console) -> None:
        from rich.text import Text

        for one in found:
            mark, style = _LEVELS[one.level]
            to.print(Text.assemble((mark, style), f"  {one.name}: {one.text}"))
            if one.hint and one.level != "ok":
                to.print(f"         hint: {one.hint}", markup=False, style="dim")
        to.print(examining.verdict(found), markup=False)

    failed = any(one.level == "error" for one in found)
    context.show({"schema": 1, "ok": not failed, "verdict": examining.verdict(found), "findings": found}, show)
    return 1 if failed else 0


def _write_profile(context: CommandContext, file: Path) -> int:
    from reconciler.commands import profiles

    context.check_output(file)
    found = profiles.measure(context.node())
    context.write_output(file, profiles.encode(found))
    context.show(found, lambda to: to.print(f"wrote {file}; commit it, and run `reconcile plan --node {file}` in CI", markup=False))
    return 0
