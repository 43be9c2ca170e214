"""Options of several commands, and types of their values: sizes, durations, shares."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from pathlib import Path

import click

from reconciler.core import units
from reconciler.core.errors import UsageError


class Seconds(click.ParamType[float]):
    """A duration such as ``30s`` or ``24h``."""

    name = "duration"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds that *value* names."""
        try:
            return units.seconds(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Size(click.ParamType[int]):
    """A number of bytes such as ``50GiB``."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes that *value* names."""
        try:
            return units.size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Share(click.ParamType[float]):
    """A part of the whole, such as ``10%``."""

    name = "share"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return *value* as a number between 0 and 1."""
        text = str(value)
        try:
            found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            found = -1.0
        if not 0 < found <= 1:
            self.fail(f"{text!r} is not a share between 0% and 100%, such as 10%", param, ctx)
        return found


class Part(click.ParamType[int]):
    """A part of all nodes, from ``0%`` to ``100%``, as a number per 10,000."""

    name = "part"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return how many of 10,000 *value* names."""
        if isinstance(value, int):
            return value
        try:
            found = Decimal(value.removesuffix("%").strip()) * 100
        except InvalidOperation:
            found = Decimal(-1)
        if not value.endswith("%") or not 0 <= found <= 10_000 or found != found.to_integral_value():
            self.fail(f"{value!r} is not a part such as 1% or 0.5%, in steps of 0.01%", param, ctx)
        return int(found)


def token_ids(text: str) -> list[int]:
    """Return the token ids in *text*, such as ``12,7,99``; raises UsageError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{text[:200]!r} is not a list of token ids such as 12,7,99") from None


FILE = click.Path(path_type=Path, dir_okay=False)
LOCK_TIMEOUT = click.option(
    "--lock-timeout", type=Seconds(), default=0.0, show_default="do not wait", metavar="TIME",
    help="How long to wait for another run to finish, e.g. 30s.",
)  # fmt: skip


def complete_models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the ids of the models in the lock that begin so, for a shell's completion; nothing where there is no lock."""
    del parameter
    try:
        from reconciler.cli.command_context import find_config, named_config
        from reconciler.core import lock
        from reconciler.settings import Settings
        from reconciler.settings_file import decode

        path = named_config(context.params.get("config")) or find_config()
        settings = decode(path.read_bytes(), path.absolute().parent) if path else Settings(base=str(Path.cwd()))
        models = lock.decode(settings.path(settings.network.lockfile).read_bytes()).model
    except Exception:  # noqa: BLE001  a shell that completes shows nothing, and no error
        return []
    return [model.id for model in models if model.id.startswith(incomplete)]


ONLY = click.option(
    "--only", multiple=True, metavar="ID", shell_complete=complete_models,
    help="Apply only this model, or all versions of this name (may be repeated).",
)  # fmt: skip
EXCEPT = click.option(
    "--except", "excluded", multiple=True, metavar="ID", shell_complete=complete_models,
    help="Skip this model, or all versions of this name (may be repeated). Removals still happen.",
)  # fmt: skip
LOCKED = click.option("--locked", is_flag=True, help="Fail if models.lock does not match the snapshot; do not update it.")
OFFLINE = click.option("--offline", is_flag=True, help="Do not use the network.")
YES = click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
MODEL_STATE = click.Choice(["enabled", "disabled", "archived", "retired"])

COUNT = click.option(
    "-n", "--number", "count", type=click.IntRange(min=1, max=1_000_000), default=30, help="Show this many, the newest first."
)
