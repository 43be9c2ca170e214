"""
The command line: options in, engine called, text or JSON out, error to exit code.

Nothing is decided here. Each command imports what it needs when it runs, so that ``--help`` answers at once and ``plan`` loads no
downloader and no engine.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from reconciler import __version__
from reconciler.cli import agent, node, publish, upkeep
from reconciler.cli.shell import say
from reconciler.errors import ReconcileError, UsageError

_SECTIONS = {
    "The node": ("init", "lock", "plan", "apply", "sync", "agent", "status"),
    "Housekeeping": ("verify", "gc", "rollback", "history", "incidents", "retry", "doctor"),
    "The network": ("trust", "key", "root", "snapshot"),
    "To see it work": ("demo",),
}


class _Sections(click.Group):
    """A group whose help lists its commands by whom they are for."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, section by section."""
        del ctx
        width = max(len(name) for name in self.commands)
        for title, names in _SECTIONS.items():
            rows = [(name.ljust(width), self.commands[name].get_short_help_str(70)) for name in names if name in self.commands]
            with formatter.section(title):
                formatter.write_dl(rows)


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


for _command in (*node.COMMANDS, *upkeep.COMMANDS, *agent.COMMANDS, publish.key, publish.root, publish.snapshot):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; return the exit code. The one place in which an error becomes one."""
    json = "--json" in arguments
    try:
        code = cli.main(arguments, prog_name="reconcile", standalone_mode=False)
        sys.stdout.flush()
    except ReconcileError as error:
        say(error, json=json)
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        return _misused(error, json=json)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: the next run finishes what this one began", err=True)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the interpreter would complain about standard output once more at its end
        return 141
    return code if isinstance(code, int) else 0


def _misused(error: click.ClickException, *, json: bool) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "reconcile"
    say(UsageError(error.format_message(), hint=f"see `{path} --help`"), json=json)
    return UsageError.exit_code


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave through every ``finally``, so that children end and the store is let go."""
    del frame
    raise SystemExit(128 + number)
