"""``status --watch``: the same output again and again, until a person or a signal ends it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from reconciler.cli.command_context import CommandContext, print_error
from reconciler.core.errors import ReconcileError

if TYPE_CHECKING:
    from rich.console import Console

_T = TypeVar("_T")
#: Moves to the upper left corner and clears what is below it.
_HOME = "\x1b[H\x1b[J"


def watch(
    context: CommandContext,
    find: Callable[[], _T],
    show: Callable[[Console, _T], None],
    every_seconds: float,
    essence: Callable[[_T], object],
) -> None:
    """
    Print what *find* returns every so often, until SIGINT.

    A terminal is redrawn. Elsewhere, and with ``--json``, it is printed when its *essence* changed; the JSON is one document a line.
    An error ends it at the start alone: later it may last for a moment, as while another run writes a new lock.
    """
    before: object = None
    to = context.console
    try:
        while True:
            try:
                found = find()
            except ReconcileError as error:
                if before is None:
                    raise
                before = _show_error(context, error, before)
            else:
                now = essence(found)
                if to.is_terminal and not context.json:
                    sys.stdout.write(_HOME)
                    show(to, found)
                elif now != before:
                    _print(context, to, found, show)
                before = now
            sys.stdout.flush()
            time.sleep(every_seconds)  # what is shown comes from files, a database and the clock, and no event tells of all of them
    except KeyboardInterrupt:
        return


def _show_error(context: CommandContext, error: ReconcileError, before: object) -> object:
    """Show *error* unless it was shown last, and return what stands for it."""
    now = (error.name, error.message)
    if now != before:
        print_error(error, json=context.json)
        sys.stdout.flush()
    return now


def _print(context: CommandContext, to: Console, found: _T, show: Callable[[Console, _T], None]) -> None:
    if context.json:
        import msgspec

        sys.stdout.write(msgspec.json.encode(found, order="deterministic").decode() + "\n")
    else:
        show(to, found)
        to.print("", markup=False)
