"""The install lines of README and documentation: which there are. ``make install-check`` types them."""

from __future__ import annotations

from tests.install_check import PAGES, lines


def test_every_install_line_is_one_that_the_check_types() -> None:
    found = [line for _, line in lines()]

    assert {page for page, _ in lines()} == set(PAGES)
    for tool in (
        "pip install '.[llama-cpp]'",
        "pipx install '.[llama-cpp]'",
        "uv tool install '.[llama-cpp]'",
        "uv tool install 'reconcile-models",
    ):
        assert any(line.startswith(tool) for line in found), tool
    assert sum("git+https://" in line for line in found) == 2


def test_no_install_line_names_a_package_of_an_index_that_is_not_ours() -> None:
    for page, line in lines():
        words = line.replace("'", " ").split()
        named = [word for word in words if word.startswith(("reconciler", "reconcile-models")) and "@" not in line]
        assert not named, (page, line)
