"""A bug leaves a report that helps to mend it, tells no secrets, and never fills a disk."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from reconciler import __version__
from reconciler.commands.context import from_settings, hold_store
from reconciler.core.errors import InternalError, StoreError
from reconciler.settings import Settings
from reconciler.store import crash_report
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger

NOW = datetime(2026, 11, 20, tzinfo=UTC)
CONTEXT = {"command": "apply", "model": "a:v1"}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "store", tmp_path / "cold")


def raised(does: Callable[[], object]) -> BaseException:
    try:
        does()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def failing(text: str) -> BaseException:
    def does() -> None:
        raise ValueError(text)

    return raised(does)


def test_it_says_what_was_done_with_which_versions_and_where_it_broke(layout: Layout) -> None:
    path = crash_report.write(layout, failing("no such thing"), CONTEXT, NOW)

    text = path.read_text()
    assert path.parent == layout.reports
    assert f"reconcile: {__version__}\n" in text
    assert "at: 2026-11-20T00:00:00Z\ncommand: apply\nmodel: a:v1\n" in text
    assert "in does" in text
    assert "ValueError: no such thing" in text


def test_what_led_to_it_is_told_too(layout: Layout) -> None:
    def does() -> None:
        try:
            json.loads("{")
        except ValueError as error:
            raise KeyError("second") from error

    text = crash_report.write(layout, raised(does), CONTEXT, NOW).read_text()

    assert "JSONDecodeError" in text
    assert "KeyError: 'second'" in text


@pytest.mark.parametrize(
    "text",
    [
        "cannot fetch https://user:SESAME@example.org/a",
        "cannot fetch https://example.org/a?sig=SESAME&x=1",
        "header Authorization: Bearer SESAME",
        "header 'Authorization': 'Basic SESAME'",
        "proxy_password=SESAME",
        '{"access_token": "SESAME"}',
        "api-key: SESAME",
        "the value SESAME of the environment",
    ],
)
def test_no_secret_gets_into_it(layout: Layout, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", "SESAME")
    secret = "SESAME"  # a variable of the frame that is on the way

    path = crash_report.write(layout, failing(text), CONTEXT, NOW)

    assert secret not in path.read_text()


def test_only_its_owner_reads_it(layout: Layout) -> None:
    path = crash_report.write(layout, failing("x"), CONTEXT, NOW)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("text", ["\x1b[2J", "\udcff\ud800", "\x00", "\u202e"])
def test_no_text_in_it_acts_on_a_terminal(layout: Layout, text: str) -> None:
    found = crash_report.write(layout, failing(text), {"model": text}, NOW).read_text()

    assert all(line.isprintable() for line in found.splitlines())


def test_one_bug_has_one_file(layout: Layout) -> None:
    paths = {crash_report.write(layout, failing(str(number)), CONTEXT, NOW) for number in range(3)}

    assert [*layout.reports.iterdir()] == [*paths]
    assert len(paths) == 1


def test_many_bugs_have_a_bounded_number_of_files_the_newest_of_them(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash_report, "REPORTS", 3)
    made = []
    for number in range(6):
        scope: dict[str, Callable[[], None]] = {}
        exec("\n" * number + "def does():\n    raise ValueError", scope)
        made.append(crash_report.write(layout, raised(scope["does"]), CONTEXT, NOW))
        os.utime(made[-1], (number, number))

    assert {*layout.reports.iterdir()} == {*made[-3:]}


def test_endless_recursion_makes_no_endless_report(layout: Layout) -> None:
    def does() -> None:
        other()

    def other() -> None:
        does()

    path = crash_report.write(layout, raised(does), CONTEXT, NOW)

    assert path.stat().st_size < 2 * crash_report.MAX_CHARACTERS


def test_an_error_with_a_long_message_makes_no_endless_report(layout: Layout) -> None:
    path = crash_report.write(layout, failing("x" * 10_000_000), CONTEXT, NOW)

    assert path.stat().st_size < 2 * crash_report.MAX_CHARACTERS


def test_the_error_names_the_bug_and_the_report(layout: Layout) -> None:
    error = crash_report.internal_error(layout, failing("secret text"), CONTEXT, NOW)

    (path,) = layout.reports.iterdir()
    assert (error.name, error.exit_code) == ("internal-error", 1)
    assert str(path) in error.message
    assert "ValueError" in error.message
    assert "(a:v1)" in error.message
    assert "secret text" not in error.message


def test_the_error_is_told_although_no_report_can_be_written(layout: Layout) -> None:
    layout.root.write_text("not a folder")

    error = crash_report.internal_error(layout, failing("x"), CONTEXT, NOW)

    assert isinstance(error, InternalError)
    assert "no report could be written" in error.message


def test_one_that_was_told_already_is_not_told_again(layout: Layout) -> None:
    first = crash_report.internal_error(layout, failing("x"), CONTEXT, NOW)

    assert crash_report.internal_error(layout, first, {}, NOW) is first
    assert len([*layout.reports.iterdir()]) == 1


def test_a_link_in_the_place_of_its_folder_is_not_followed(layout: Layout, tmp_path: Path) -> None:
    layout.root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    layout.reports.symlink_to(tmp_path / "elsewhere")

    error = crash_report.internal_error(layout, failing("x"), CONTEXT, NOW)

    assert [*(tmp_path / "elsewhere").iterdir()] == []
    assert "no report could be written" in error.message


# -- whoever holds the store -----------------------------------------------------------------------


def test_a_bug_while_the_store_is_held_is_an_incident_with_a_report(tmp_path: Path) -> None:
    node = from_settings(Settings(base=str(tmp_path)))

    with pytest.raises(InternalError) as found, hold_store(node):
        raise KeyError("a bug")

    (path,) = node.layout.reports.iterdir()
    assert "KeyError: 'a bug'" in path.read_text()
    with Ledger.reading(node.layout.ledger) as ledger:
        (incident,) = ledger.incidents()
    assert (incident.kind, incident.model, incident.detail) == ("internal-error", "", found.value.message)


@pytest.mark.parametrize(
    "error", [StoreError("the disk refused"), OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)]
)
def test_what_is_no_bug_passes_as_it_is(tmp_path: Path, error: BaseException) -> None:
    node = from_settings(Settings(base=str(tmp_path)))

    with pytest.raises(type(error)) as found, hold_store(node):
        raise error

    assert found.value is error
    assert not node.layout.reports.exists()
