"""
The command line: it reads options, calls a function of ``commands``, prints text or JSON, and turns an error into an exit code.

Nothing is decided here. Start with ``node`` (lock, plan, apply, sync); ``command_context`` is what each command gets. A module of commands
is imported when one of its commands is asked for, and each command imports what it needs when it runs, so that ``plan`` loads no
downloader, no engine and no other command.
"""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import click

from reconciler import __version__
from reconciler.cli.command_context import from_os_error, print_error
from reconciler.core.errors import ReconcileError, UsageError


class _Command(NamedTuple):
    """Where a command is defined, and what the help of the whole program says of it: that imports no command."""

    module: str
    summary: str


#: The commands by section of the help text.
_SECTIONS = {
    "The node": {
        "init": _Command("init", "Write reconcile.toml and pin the network's trust root."),
        "lock": _Command("node", "Verify a snapshot and compile it to models.lock."),
        "plan": _Command("node", "Show what apply would do, and why."),
        "apply": _Command("node", "Apply the lock to this node: download, verify, test, activate."),
        "sync": _Command("node", "Fetch the latest snapshot, then apply it."),
        "agent": _Command("agent", "Run sync repeatedly, and re-hash and repair the store."),
        "status": _Command("status", "Show every model's state and why."),
    },
    "Housekeeping": {
        "verify": _Command("maintenance", "Re-hash all stored files and compare them with the signed digests."),
        "gc": _Command("maintenance", "Delete files that no listed model, kept generation or grace period needs."),
        "rollback": _Command("history", "Return to the models that served before the last run, or in generation N."),
        "resume": _Command("history", "End the hold of a rollback."),
        "history": _Command("history", "Show which generations were activated, when, by which command and why."),
        "incidents": _Command("maintenance", "Show what was refused, failed, quarantined or repaired."),
        "retry": _Command("maintenance", "Clear MODEL's failure record so that the next apply retries it immediately."),
        "doctor": _Command("doctor", "Check this machine for problems and show how to fix them."),
        "config": _Command("configuration", "Show and check the settings of this node."),
    },
    "Without a network": {
        "bundle": _Command("bundle", "Carry a snapshot and its models to nodes without a network."),
    },
    "Servers": {
        "serve": _Command("serve", "Show the servers that follow the active set, and reload them by hand."),
    },
    "Trust and publishing": {
        "trust": _Command("maintenance", "Show and update the trust root and the record of accepted snapshots."),
        "key": _Command("operator", "Make and show signing keys."),
        "root": _Command("operator", "Make, change and sign the trust root: which keys may sign, and how many must."),
        "snapshot": _Command("operator", "Make, change and sign the snapshot: the list of models that nodes hold."),
    },
    "Many nodes": {
        "fleet": _Command("fleet", "Read the signed statuses of many nodes."),
        "swarm": _Command("swarm", "Run the process that gives files to other nodes and takes them, over BitTorrent."),
    },
    "Demonstration and shells": {
        "demo": _Command("maintenance", "Run the whole workflow here, on small real models that it makes."),
        "completion": _Command("configuration", "Print the completion script for a shell: commands, options and model ids."),
    },
}
_COMMANDS = {name: command for names in _SECTIONS.values() for name, command in names.items()}


_Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


class _OutputClosed(Exception):
    """The reader of standard output has closed it."""


class _Sections(click.Group):
    """A group that imports a command when it is asked for, and whose help lists them by section."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command *cmd_name*, or None."""
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        found: click.Command = getattr(importlib.import_module(f"reconciler.cli.{_COMMANDS[cmd_name].module}"), cmd_name)
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a misspelt one is an error that names the nearest."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            import difflib

            near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            ctx.fail(f"there is no command {args[0]!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. click would give a closed pipe an exit code of its own."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _OutputClosed from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, section by section."""
        del ctx
        width = max(map(len, _COMMANDS))
        for title, names in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), command.summary) for name, command in names.items()])


def _show_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """Show the version, with ``--json`` also the words of snapshots that it knows."""
    if not asked:
        return
    if context.params.get("as_json"):
        import json

        from reconciler.core.vocabulary import KNOWN

        click.echo(json.dumps({"schema": 1, "version": __version__, **KNOWN}))
    else:
        click.echo(f"reconcile, version {__version__}")
    context.exit()


@click.group(
    cls=_Sections,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog="Exit codes: 0 done · 1 error · 2 changes pending (plan --detailed-exitcode, lock --check) · 3 done, but a model "
    "failed or was not downloaded · 4 trust refused · 5 another run holds the store · 6 no snapshot fetched for longer than quiet_after · "
    "64 wrong usage",
)
@click.option("--json", "as_json", is_flag=True, is_eager=True, hidden=True)
@click.option("--version", is_flag=True, expose_value=False, callback=_show_version, help="Show the version and exit.")
def cli(*, as_json: bool) -> None:
    """
    Decide which AI models this node holds, and make it so.

    The network signs a list of models. This node verifies it, locks it, shows what would change, and applies the changes.

    \b
      reconcile init --root root.json --snapshot https://…/snapshot.json
      reconcile lock        the signed snapshot, compiled to models.lock
      reconcile plan        what would change on this node, and why
      reconcile apply       carry it out
      reconcile status      the state of each model, and why
    """
    if as_json:
        raise click.UsageError("--json stands after the command, or with --version")


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    _open_streams()
    _set_signal_handlers(_terminate, signal.default_int_handler)
    gc.disable()  # a plan makes a hundred thousand values and no cycles; searching for cycles takes a tenth of its time. Runs enable it
    code = run(sys.argv[1:])
    _set_signal_handlers(signal.SIG_DFL, signal.SIG_DFL)  # the result is printed: nothing is left to clean up
    gc.freeze()  # else the interpreter searches for cycles when it exits
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line and return the exit code. Errors become exit codes here and nowhere else."""
    json = "--json" in arguments
    try:
        code = cli.main(arguments, prog_name="reconcile", standalone_mode=False)
        sys.stdout.flush()
    except ReconcileError as error:
        print_error(error, json=json)
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        return _report_usage_error(error, arguments, json=json)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: the next run finishes what this one began", err=True)
        return 130
    except (_OutputClosed, BrokenPipeError):  # before OSError, its base class
        sys.stderr.close()  # else the interpreter reports the closed standard output once more when it exits
        return 141
    except OSError as error:  # a folder that is not there, a full disk behind the terminal
        print_error(from_os_error(error), json=json)
        return 1
    except Exception as error:  # noqa: BLE001  whatever it is, a person gets one sentence
        from reconciler.commands.context import report_bug

        print_error(report_bug(error), json=json)
        return 1
    return code if isinstance(code, int) else 0


#: What click raises for a group without a command, since its version 8.2.
_HELP: type[click.ClickException] | tuple[()] = getattr(click.exceptions, "NoArgsIsHelpError", ())


def _report_usage_error(error: click.ClickException, arguments: list[str], *, json: bool) -> int:
    if isinstance(error, _HELP):
        click.echo(error.format_message(), err=True)
        return UsageError.exit_code
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else _command_path(arguments)
    print_error(UsageError(error.format_message(), hint=f"see `{path} --help`"), json=json)
    return UsageError.exit_code


def _command_path(arguments: list[str]) -> str:
    """Return the command that *arguments* begin with, for an error of click's parser that does not say of which it is."""
    command: click.Command | None = cli
    path = ["reconcile"]
    for word in arguments:
        inner = command.get_command(click.Context(command), word) if isinstance(command, click.Group) else None
        if inner is None:
            break
        command, path = inner, [*path, word]
    return " ".join(path)


def _open_streams() -> None:
    """Open streams that are closed on the null device, and escape characters that the terminal's encoding lacks."""
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115  as below
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  open as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _set_signal_handlers(end: _Handler, interrupt: _Handler) -> None:
    """Handle SIGTERM and SIGHUP with *end*, SIGINT with *interrupt*. A signal that is ignored from the start (nohup) stays ignored."""
    for number, answer in ((signal.SIGTERM, end), (signal.SIGHUP, end), (signal.SIGINT, interrupt)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, answer)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Raise SystemExit, so that every ``finally`` runs: child processes end and the store's lock is released."""
    del frame
    raise SystemExit(128 + number)
