"""Amounts as people write them on a command line: sizes, times, shares."""

from __future__ import annotations

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
