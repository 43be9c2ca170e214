"""Lines and columns of text without a terminal's codes: for pipes, files and logs, and without rich, which is slow to import."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 400


class PlainLines:
    """A console without colours. Text is written as it is; rich, which is slow to import, is used for tables only."""

    is_terminal = False

    def __init__(self, *, stderr: bool) -> None:
        self._stderr = stderr

    def print(self, *what: object, markup: bool = False, style: str = "") -> None:
        """Print *what* as one line; *style* is ignored for text."""
        del markup
        stream = sys.stderr if self._stderr else sys.stdout
        if all(isinstance(one, str) for one in what):
            stream.write(f"{' '.join(map(str, what))}\n")
            return
        from rich.console import Console

        # A pipe has no width: lines are not wrapped, so that grep finds what it searches for.
        to = Console(file=stream, no_color=True, highlight=False, soft_wrap=True, force_terminal=False, width=_PIPE_WIDTH)
        to.print(*what, style=style or None)


def print_columns(to: Console, rows: Sequence[tuple[str, ...]]) -> None:
    """Print *rows* in columns of even width. rich takes most of a second to be imported and to lay out ten thousand of them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = [f"{text:{width}}" for text, width in zip(row[:-1], widths, strict=False)]
        to.print("  ".join([*padded, row[-1]]), markup=False)
