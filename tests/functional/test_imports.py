"""A command imports what it needs and no more: each module costs a millisecond at each start, and cron and CI pay it every time."""

import click
import pytest

from benchmarks import imported
from reconciler.cli import cli
from tests.node import Node, run, tiny

#: What only downloading, unpacking, testing or serving needs.
_WORK = (
    "reconciler.fetch.downloader",
    "reconciler.fetch.hashing",
    "reconciler.fetch.aria2_daemon",
    "reconciler.commands.blob_sources",
    "reconciler.unpack",
    "reconciler.sandbox",
    "reconciler.runtime.smoke_test",
    "reconciler.serve.kinds",
    "reconciler.store.quarantine",
    "concurrent.futures",
    "subprocess",
    "tempfile",
    "rich",
    "requests",
    "aria2p",
    "llama_cpp",
    "cryptography",
)
#: For each command: the most modules of this program that it imports, and what it does not import at all, with all that is below it.
TABLE = {
    "--version": (6, (*_WORK, "reconciler.core.lock", "reconciler.settings", "reconciler.store", "sqlite3", "tomllib", "http")),
    "--help": (6, (*_WORK, "reconciler.core.lock", "reconciler.settings", "reconciler.store", "sqlite3", "tomllib", "http")),
    "plan": (65, (*_WORK, "reconciler.apply", "reconciler.fetch.http", "reconciler.hooks", "http", "ssl")),
    "status": (70, (*_WORK, "reconciler.apply", "reconciler.fetch.http", "http", "ssl")),
    "sync": (97, _WORK),
}


@pytest.mark.parametrize("command", TABLE)
def test_a_command_that_changes_nothing_imports_what_it_needs(node: Node, command: str) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("sync").code == 0
    assert node.run("sync").code == 0  # what the first run left to remember is remembered
    most, without = TABLE[command]
    settings = () if command.startswith("--") else ("--config", str(node.folder / "reconcile.toml"))
    found = imported.modules(command, *settings)
    own = imported.own(found)
    assert "reconciler.cli" in own
    assert len(own) <= most, sorted(own)
    assert not {name for name in found if any(name == one or name.startswith(f"{one}.") for one in without)}


def test_the_help_says_of_each_command_what_that_command_says_of_itself() -> None:
    """The help of the whole program imports no command, so that the first line of each stands twice."""
    shown = " ".join(run("--help").out.split())
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        assert f" {name} {command.get_short_help_str(100)}" in shown
