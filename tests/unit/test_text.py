"""Text that somebody else chose is shown without letting it act on a terminal or a log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.text import printable


@pytest.mark.parametrize("text", ["plain ä 漢", 'it\'s "quoted" \\ and so on', ""])
def test_what_can_be_printed_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b[31mred", "\\x1b[31mred"), ("line\nforged", "line\\nforged"), ("\u202eevil", "\\u202eevil"), ("\udcff", "\\udcff")],
)
def test_what_a_terminal_may_act_on_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_cut_is_shown() -> None:
    assert printable("abcdef", 3) == "abc…"
    assert printable("abc", 3) == "abc"


@given(st.text(st.characters()))
def test_whatever_comes_in_one_printable_line_goes_out_that_any_file_takes(text: str) -> None:
    shown = printable(text)

    assert shown.isprintable()
    assert printable(shown) == shown
    shown.encode()
