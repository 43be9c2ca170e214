"""
The command line: options in, engine called, text or JSON out, error to exit code.

Nothing is decided here. Each room of commands is imported when one of them is asked for, and each command imports what it needs when
it runs, so that ``plan`` loads no downloader, no engine and no other command.
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
from typing import Any, NoReturn

import click

from reconciler import __version__
from reconciler.cli.command_context import from_os_error, print_error
from reconciler.core.errors import ReconcileError, UsageError

#: The commands, by whom they are for, each with the module that it is in.
_SECTIONS = {
    "The node": {"init": "node", "lock": "node", "plan": "node", "apply": "node", "sync": "node", "agent": "node", "status": "node"},
    "Housekeeping": {
        "verify": "maintenance", "gc": "maintenance", "rollback": "maintenance", "history": "maintenance", "incidents": "maintenance",
        "retry": "maintenance",
        "doctor": "maintenance",
    },
    "The network": {"trust": "maintenance", "key": "operator", "root": "operator", "snapshot": "operator"},
    "To see it work": {"demo": "maintenance"},
}  # fmt: skip
_MODULES = {name: module for names in _SECTIONS.values() for name, module in names.items()}


_Answer = Callable[[int, FrameType | None], Any] | signal.Handlers


class _OutputClosed(Exception):
    """Nobody reads standard output any more."""


class _Sections(click.Group):
    """A group that imports a command when it is asked for, and whose help lists them by whom they are for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        del ctx
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command *cmd_name*, or None."""
        del ctx
        if cmd_name not in _MODULES:
            return None
        found: click.Command = getattr(importlib.import_module(f"reconciler.cli.{_MODULES[cmd_name]}"), cmd_name)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; click would make a pipe that nobody reads an exit code of its own."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _OutputClosed from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, section by section."""
        width = max(map(len, _MODULES))
        for title, names in _SECTIONS.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), command.get_short_help_str(70)) for name, command in found if command])


@click.group(
    cls=_Sections,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog="Exit codes: 0 done · 1 error · 2 changes pending (plan --detailed-exitcode, lock --check) · 3 done, a model failed · "
    "4 trust refused · 5 another run holds the store · 64 wrong usage",
)
@click.version_option(__version__, prog_name="reconcile")
def cli() -> None:
    """
    Decide which AI models this node holds, and make it so.

    The network signs a list of models; this node verifies it, locks it, shows the difference and carries it out.

    \b
      reconcile init --root root.json --snapshot https://…/snapshot.json
      reconcile lock        what the network says, as models.lock
      reconcile plan        what would happen here, and why
      reconcile apply       make it so
      reconcile status      what is active, and what is not
    """


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    _open_streams()
    _set_signal_handlers(_terminate, signal.default_int_handler)
    gc.disable()  # a plan makes a hundred thousand values and no cycles: looking for them takes a tenth of its time; runs enable it
    code = run(sys.argv[1:])
    _set_signal_handlers(signal.SIG_DFL, signal.SIG_DFL)  # the answer is given: nothing is left to unwind
    gc.freeze()  # at its end the interpreter would look for them after all
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; return the exit code. The one place in which an error becomes one."""
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
        return _report_usage_error(error, json=json)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: the next run finishes what this one began", err=True)
        return 130
    except (_OutputClosed, BrokenPipeError):  # before OSError, of which it is one
        sys.stderr.close()  # the interpreter would complain about standard output once more at its end
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


def _report_usage_error(error: click.ClickException, *, json: bool) -> int:
    if isinstance(error, _HELP):
        click.echo(error.format_message(), err=True)
        return UsageError.exit_code
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "reconcile"
    print_error(UsageError(error.format_message(), hint=f"see `{path} --help`"), json=json)
    return UsageError.exit_code


def _open_streams() -> None:
    """Give closed streams a place, and let no terminal's encoding stop a run."""
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115  as below
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  open as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _set_signal_handlers(end: _Answer, interrupt: _Answer) -> None:
    """Answer what ends a run with *end*, and an interrupt with *interrupt*; what the run was started without (nohup) stays ignored."""
    for number, answer in ((signal.SIGTERM, end), (signal.SIGHUP, end), (signal.SIGINT, interrupt)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, answer)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave through every ``finally``, so that children end and the store is let go."""
    del frame
    raise SystemExit(128 + number)
