"""``status --watch``: the same output again and again, until a person or a signal ends it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from reconciler.cli.command_context import CommandContext

if TYPE_CHECKING:
    from rich.console import Console

_T = TypeVar("_T")
#: Moves to the upper left corner and clears what is below it.
_HOME = "\x1b[H\x1b[J"


def watch(context: CommandContext, find: Callable[[], _T], show: Callable[[Console, _T], None], every_seconds: float) -> None:
    """
    Print what *find* returns every so often, until SIGINT.

    A terminal is redrawn. Elsewhere, and with ``--json``, it is printed when it changed; the JSON is one document a line.
    """
    import msgspec

    before = b""
    to = context.console
    try:
        while True:
            found = find()
            data = msgspec.json.encode(found, order="deterministic")
            if to.is_terminal and not context.json:
                sys.stdout.write(_HOME)
                show(to, found)
            elif data != before:
                _print(context, to, found, data, show)
            sys.stdout.flush()
            before = data
            time.sleep(every_seconds)
    except KeyboardInterrupt:
        return


def _print(context: CommandContext, to: Console, found: _T, data: bytes, show: Callable[[Console, _T], None]) -> None:
    if context.json:
        sys.stdout.write(data.decode() + "\n")
    else:
        show(to, found)
        to.print("", markup=False)
