"""Names of hosts and patterns of them: what matches, and what is refused because it would match nothing or too much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core import urls

LABEL = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
NAME = st.lists(LABEL, min_size=1, max_size=4).map(".".join)


@pytest.mark.parametrize("host", ["cdn.hf.co", "a.b.hf.co", "xn--bcher-kva.hf.co"])
def test_a_pattern_matches_names_below_it_of_any_depth(host: str) -> None:
    assert urls.host_matches(host, {"*.hf.co"})


@pytest.mark.parametrize(
    "host", ["hf.co", "evilhf.co", "hf.co.evil.example", "cdn.hf.co.evil", "cdn.hf.com", "co", "", "127.0.0.1", "*.hf.co.x", "::1"]
)
def test_a_pattern_matches_nothing_else(host: str) -> None:
    assert not urls.host_matches(host, {"*.hf.co", "*.0.0.1"})


@given(NAME, NAME)
def test_a_name_below_matches_and_the_name_itself_does_not(below: str, name: str) -> None:
    urls.check_pattern(f"*.{name}")
    assert urls.host_matches(f"{below}.{name}", {f"*.{name}"})
    assert not urls.host_matches(name, {f"*.{name}"})
    assert urls.host_matches(name, {name})


@pytest.mark.parametrize(
    "text", ["a.example", "A.Example.", "localhost", "10.0.0.1", "::1", "fd00::1", "xn--bcher-kva.example", "a_b.example"]
)
def test_hosts(text: str) -> None:
    urls.check_host(text)
    urls.check_pattern(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "*", "*.", "*.*", "*.0.0.2", "*.10.0.0.1", "*.::1", "a.*.example", "*a.example", "**.example", "*.*.example", "https://a.example",
        "a.example/x", "a.example:443", "[::1]", "user@a.example", "a..example", ".a.example", "a.example..", "-a.example", "a-.example",
        "bücher.example", "a%2eexample", "a example", "a\n", "1.2.3", "0x7f.1", "*.example.1", "a" * 64 + ".example",
    ],
)  # fmt: skip
def test_what_would_match_nothing_or_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"host|matches nothing|number"):
        urls.check_pattern(text)
