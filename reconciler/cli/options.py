"""Options that several commands have, and the amounts that people write on a command line: sizes, times, shares."""

from __future__ import annotations

from pathlib import Path

import click

from reconciler.core import units


class Seconds(click.ParamType[float]):
    """A duration as people write it."""

    name = "duration"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds that *value* names."""
        try:
            return units.seconds(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Size(click.ParamType[int]):
    """A number of bytes as people write it."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes that *value* names."""
        try:
            return units.size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Share(click.ParamType[float]):
    """A part of the whole, as in 10%."""

    name = "share"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return *value* as a number between 0 and 1."""
        text = str(value)
        try:
            found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            found = -1.0
        if not 0 < found <= 1:
            self.fail(f"{text!r} is not a share; write it like 10%", param, ctx)
        return found


FILE = click.Path(path_type=Path, dir_okay=False)
LOCK_TIMEOUT = click.option("--lock-timeout", type=Seconds(), default=0.0, metavar="TIME", help="Wait so long for another run, as in 30s.")
ONLY = click.option("--only", multiple=True, metavar="ID", help="This model alone (may be given again).")
EXCEPT = click.option("--except", "excluded", multiple=True, metavar="ID", help="All but this model; what is taken away stops as ever.")
LOCKED = click.option("--locked", is_flag=True, help="Refuse a lock that is not what the snapshot compiles to; never fetch a new one.")
OFFLINE = click.option("--offline", is_flag=True, help="Touch no network at all.")
YES = click.option("-y", "--yes", is_flag=True, help="Do not ask.")
MODEL_STATE = click.Choice(["enabled", "disabled", "archived"])
