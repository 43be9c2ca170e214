"""
What a command gets from its caller: the settings, where text and JSON are written, how errors are reported, whether it may ask.

With ``--json``, standard output is JSON only and text for people goes to standard error. ``--json-into FILE`` writes the JSON to a file
and the text to the terminal. There is never a prompt without a terminal.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from reconciler import files
from reconciler.core.errors import LockMismatch, NothingToCheck, ReconcileError, SettingsError, StoreError, UntrustedFile, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from reconciler.commands.context import NodeContext
    from reconciler.core.events import Event
    from reconciler.ports import Reporter
    from reconciler.report.events import JsonLines
    from reconciler.report.log_lines import LogFormat, LogLines
    from reconciler.report.terminal import EventLines
    from reconciler.settings import Settings
    from reconciler.store.layout import Layout

_F = TypeVar("_F", bound=Callable[..., Any])
CONFIG_NAME = "reconcile.toml"
_NOT_YOURS = "run as the user that owns it (`ls -l`)"


class CommandContext:
    """The common options of one command, and what follows from them."""

    def __init__(self, *, config: Path | None, json: bool, json_into: Path | None, color: bool, quiet: bool, verbose: bool) -> None:
        self.config = config
        self.json = json
        self.json_into = json_into
        self.color = color and "NO_COLOR" not in os.environ
        self.quiet = quiet
        self.verbose = verbose
        self._streamed = False
        self._has_no_settings = False
        self._layout: Layout | None = None

    def settings(self) -> Settings:
        """
        Return the caller's settings; without a settings file, the defaults, relative to the working directory.

        Settings that the caller named (``--config``, ``$RECONCILE_CONFIG``) are used with all that they name. What is found by looking
        in the working directory and above it is used only if nobody but root and the caller can change it, and what it names.

        Raises:
            SettingsError: they cannot be read, or are invalid.
            UntrustedFile: they were found, and another user can change them or what they name.
        """
        from reconciler import settings_file

        path = named_config(self.config)
        if path is not None:
            return settings_file.decode(_read(path, Path.read_bytes), path.absolute().parent, str(path), os.environ)
        path, uid = find_config(), os.geteuid()
        with _with_config_hint(path):
            if path is None:
                self._has_no_settings = True
                found = settings_file.decode(b"", Path.cwd(), "the defaults", os.environ)
            else:
                found = settings_file.decode(_read(path, lambda path: files.read_trusted(path, uid)), path.parent, str(path), os.environ)
            found.check_trusted(uid, named=settings_file.keys_from(os.environ))
        return found

    @property
    def config_file(self) -> Path | None:
        """The settings file that holds here; None where there is none."""
        return named_config(self.config) or find_config()

    def node(self) -> NodeContext:
        """Return the settings that hold here as values, for the functions of ``commands``."""
        from reconciler.commands import context

        node = context.from_settings(self.settings())
        self._layout = node.layout
        return node

    def explain(self, error: Exception) -> ReconcileError:
        """Return *error* if it is one of this program's own, else what tells of it: the system refused, or it is a bug and has a report."""
        if isinstance(error, ReconcileError):
            return error
        if isinstance(error, OSError):
            return from_os_error(error)
        from reconciler.commands.context import report_bug

        return report_bug(error, self._layout)

    def check_output(self, path: Path) -> None:
        """
        Check that *path*, an output that the caller names, is none of the node's own files.

        Raises:
            UsageError: it is one.
        """
        from reconciler.settings import Settings

        config = self.config_file
        try:
            settings = self.settings()
        except SettingsError:  # the command reports it; until then, the defaults name the node's files
            settings = Settings(base=str((config or Path(CONFIG_NAME)).absolute().parent))
        is_config = config is not None and os.path.realpath(config) == os.path.realpath(path)
        if own := "the settings" if is_config else settings.own(path):
            raise UsageError(f"{path} is {own}, and is not overwritten", hint="name another file")

    def write_output(self, path: Path, data: bytes) -> None:
        """Write *data* to *path*, which ``check_output`` accepted; raises OSError."""
        with _named(path):
            path.write_bytes(data)

    @property
    def console(self) -> Console:
        """The console for people: standard output, or standard error with ``--json``."""
        from reconciler.report import terminal

        stream = sys.stderr if self.json else sys.stdout
        return terminal.console(stderr=self.json, color=self.color and stream.isatty())

    def show(self, value: object, show: Callable[[Console], None]) -> None:
        """Write *value* as one JSON document where the options ask for it; else call *show* with the console for people."""
        data = to_json(value)
        if self.json_into:
            self.write_output(self.json_into, data.encode())
        if self.json:
            sys.stdout.write(data)
            sys.stdout.flush()
        elif not self.quiet:
            show(self.console)

    def report_error(self, error: ReconcileError) -> None:
        """Write *error* to the file of ``--json-into``: after the events of a run, or in place of another command's document."""
        if (
            self._has_no_settings
            and isinstance(error, LockMismatch | NothingToCheck | SettingsError)
            and not isinstance(error, UntrustedFile)
            and "environment" not in error.message
        ):
            error.hint += f"; there is no {CONFIG_NAME} in this folder or a parent: `reconcile init` writes one, and --config names another"
        if self.json_into:
            with contextlib.suppress(OSError), self.json_into.open("ab" if self._streamed else "wb") as file:
                file.write(_error_json(error) + b"\n")

    @contextlib.contextmanager
    def reporter(self, *, stream: bool = True, log: LogFormat | None = None) -> Iterator[Reporter]:
        """
        Give a reporter for a run's events: progress bars on a terminal, plain lines elsewhere, JSON lines where the options ask for it.

        With *log*, text for people is a log in that form.

        Raises:
            OSError: the run is over, and standard output or the file could not be written completely.
        """
        gc.enable()  # a run may take hours
        with contextlib.ExitStack() as stack:
            people = None if self.json and stream else self._log(log) if log else stack.enter_context(self._lines())
            output = self._events(sys.stdout) if self.json and stream else None
            into = self._events(stack.enter_context(self._opened(self.json_into))) if self.json_into and stream else None
            listeners = [one for one in (people, output, into) if one is not None]

            def report(event: Event) -> None:
                for listener in listeners:
                    listener(event)

            yield report
            standard_output = output or (None if self.json else people)
            if standard_output and standard_output.failure:
                raise standard_output.failure
            if self.json_into and into and into.failure:
                with _named(self.json_into):
                    raise into.failure

    def _events(self, stream: IO[str]) -> JsonLines:
        from reconciler.commands.context import wall_clock
        from reconciler.report import events

        return events.JsonLines(stream, wall_clock)

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[IO[str]]:
        file = path.open("w", encoding="utf-8")
        self._streamed = True
        try:
            yield file
        finally:
            with _named(path):  # closing writes what is buffered, and may fail
                file.close()

    def _log(self, form: LogFormat) -> LogLines:
        from reconciler.commands.context import wall_clock
        from reconciler.report import log_lines

        return log_lines.LogLines(sys.stdout, form, wall_clock, quiet=self.quiet, verbose=self.verbose)

    @property
    def log_format(self) -> LogFormat | None:
        """The form of a log where none is asked for: the journal's where systemd reads it, text elsewhere, and none on a terminal."""
        if sys.stdout.isatty():
            return None
        return "journald" if "JOURNAL_STREAM" in os.environ else "text"

    def _lines(self) -> EventLines:
        from reconciler.report import terminal

        to = self.console
        kind = terminal.ProgressBars if to.is_terminal and not self.quiet else terminal.EventLines
        return kind(to, quiet=self.quiet, verbose=self.verbose)

    @property
    def is_interactive(self) -> bool:
        """Whether a person can be asked: standard input and output are a terminal, and no program reads the output."""
        return not self.json and sys.stdin.isatty() and sys.stdout.isatty()

    def confirm(self, question: str) -> None:
        """Ask on a terminal; raises ``click.exceptions.Exit`` if the answer is no."""
        if not click.confirm(question, default=False):
            click.echo("nothing was done", err=True)
            raise click.exceptions.Exit(130)

    def require_confirmation(self, question: str) -> None:
        """
        Ask on a terminal.

        Raises:
            UsageError: nobody can be asked.
            click.exceptions.Exit: the answer is no.
        """
        if not self.is_interactive:
            raise UsageError(f"confirmation is required, and there is no terminal: {question}", hint="confirm with --yes")
        self.confirm(question)


def to_json(value: object) -> str:
    """Return *value* as an indented JSON document."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=2).decode() + "\n"


def named_config(given: Path | None) -> Path | None:
    """Return the settings' file that the caller names, on the command line or in the environment."""
    from_environment = os.environ.get("RECONCILE_CONFIG")
    return given or (Path(from_environment) if from_environment else None)


def find_config() -> Path | None:
    """Return the nearest settings' file in the working directory and the folders above it."""
    here = Path.cwd()
    return next((folder / CONFIG_NAME for folder in (here, *here.parents) if (folder / CONFIG_NAME).is_file()), None)


def _read(path: Path, read: Callable[[Path], bytes]) -> bytes:
    try:
        return read(path)
    except OSError as error:
        hint = "`reconcile init` writes one" if isinstance(error, FileNotFoundError) else _NOT_YOURS
        raise SettingsError(f"{path} cannot be read: {error.strerror}", hint=hint) from None


@contextlib.contextmanager
def _with_config_hint(found: Path | None) -> Iterator[None]:
    """Add to the refusal of a file that was *found* the option with which the caller can use it anyway."""
    try:
        yield
    except UntrustedFile as error:
        named = f"--config {found}" if found else f"--config FILE, with settings that `reconcile init` writes ({CONFIG_NAME})"
        hint = f"{error.hint}; or, if you trust whoever can change these files, name the settings: {named}"
        raise UntrustedFile(error.message, hint=hint) from None


def common_options(*, json: bool = True) -> Callable[[_F], _F]:
    """Add the options that every command of the node has. The command gets a ``CommandContext`` as its first argument."""

    def decorate(command: _F) -> _F:
        def run(**given: Any) -> Any:
            context = CommandContext(
                config=given.pop("config"),
                json=given.pop("json", False),
                json_into=given.pop("json_into", None),
                color=given.pop("color"),
                quiet=given.pop("quiet"),
                verbose=given.pop("verbose"),
            )
            if context.json_into:
                context.check_output(context.json_into)
            try:
                return command(context, **given)
            except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
                raise
            except Exception as error:  # noqa: BLE001  whatever it is, a person gets one sentence
                explained = context.explain(error)
                context.report_error(explained)
                raise explained from None

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__dict__.update(command.__dict__)
        wrapped: Any = run
        path = click.Path(path_type=Path, dir_okay=False)
        options = [
            click.option("-v", "--verbose", is_flag=True, help="Print more details."),
            click.option("-q", "--quiet", is_flag=True, help="Print only errors and warnings."),
            click.option("--color/--no-color", default=True, help="Use colour on a terminal (also respects NO_COLOR)."),
            click.option(
                "--config", type=path, help="Settings file. Default: $RECONCILE_CONFIG, then reconcile.toml in this folder or a parent."
            ),
        ]
        if json:
            options += [
                click.option("--json-into", type=path, metavar="FILE", help="Write JSON to FILE and text here."),
                click.option("--json", is_flag=True, help="Write JSON to standard output and text to standard error."),
            ]
        for option in options:
            wrapped = option(wrapped)
        result: _F = wrapped
        return result

    return decorate


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add *path* to an error of the system, which names no file when a write fails."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


#: Errors of a write to a full or failing disk, quota or device.
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


def from_os_error(error: OSError) -> StoreError:
    """Return an error of the operating system as a ``StoreError``."""
    where = error.filename or ("standard output" if error.errno in _WRITE_ERRORS else "the system refused")
    return StoreError(f"{where}: {error.strerror or error}", hint=_NOT_YOURS if isinstance(error, PermissionError) else "")


def print_error(error: ReconcileError, *, json: bool) -> None:
    """Print an error with its hint. If that fails too, the exit code is all that remains."""
    if json:
        with contextlib.suppress(OSError):
            click.echo(_error_json(error).decode())
    with contextlib.suppress(OSError):
        click.secho(f"error[{error.name}]: {error.message}", err=True, fg="red" if _uses_color() else None)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)


def _error_json(error: ReconcileError) -> bytes:
    return msgspec.json.encode({"error": {"name": error.name, "message": error.message, "hint": error.hint}})


def _uses_color() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ and "--no-color" not in sys.argv
