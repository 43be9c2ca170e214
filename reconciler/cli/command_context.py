"""
Between a command and its terminal: which settings, where text and JSON go, how an error is said.

With ``--json``, standard output is JSON only and people's text goes to standard error; ``--json-into FILE`` puts the JSON there
and leaves the terminal to people. There is never a prompt without a terminal.
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
from reconciler.core.errors import LockMismatch, ReconcileError, SettingsError, StoreError, UntrustedFile, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from reconciler.commands.context import NodeContext
    from reconciler.ports import Event, Reporter
    from reconciler.report.events import JsonLines
    from reconciler.report.terminal import EventLines
    from reconciler.settings import Settings
    from reconciler.store.layout import Layout

_F = TypeVar("_F", bound=Callable[..., Any])
CONFIG_NAME = "reconcile.toml"
_NOT_YOURS = "run as the user whom it belongs to (`ls -l`)"


class CommandContext:
    """What one command knows of its surroundings."""

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
        Return the settings that hold here; all defaults, relative to the working directory, where no file is found.

        Settings that the caller named (``--config``, ``$RECONCILE_CONFIG``) are used with all that they name. What is found by looking
        in the working directory and above it is used only if nobody but root and the caller can change it, and what it names.

        Raises:
            SettingsError: they cannot be read, or are invalid.
            UntrustedFile: they were found, and another user can change them or what they name.
        """
        from reconciler import settings

        path = named_config(self.config)
        if path is not None:
            return settings.decode(_read(path, Path.read_bytes), path.absolute().parent, str(path))
        path, uid = find_config(), os.geteuid()
        with _naming_the_way_out(path):
            if path is None:
                self._has_no_settings = True
                found = settings.Settings(base=str(Path.cwd()))
            else:
                found = settings.decode(_read(path, lambda path: files.read_trusted(path, uid)), path.parent, str(path))
            found.check_trusted(uid)
        return found

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
        See that *path*, where somebody wants something written, is nothing that the node lives by.

        Raises:
            UsageError: the node lives by what is there.
        """
        from reconciler.settings import Settings

        config = named_config(self.config) or find_config()
        try:
            settings = self.settings()
        except SettingsError:  # of which the command tells; until then the defaults say what is the node's
            settings = Settings(base=str((config or Path(CONFIG_NAME)).absolute().parent))
        is_config = config is not None and os.path.realpath(config) == os.path.realpath(path)
        if own := "the settings" if is_config else settings.own(path):
            raise UsageError(f"{path} is {own}, and is not written over", hint="name another file")

    def write_output(self, path: Path, data: bytes) -> None:
        """Write what was asked for to *path*, which `output` let pass; raises OSError."""
        with _named(path):
            path.write_bytes(data)

    @property
    def console(self) -> Console:
        """Where people's text goes."""
        from reconciler.report import terminal

        stream = sys.stderr if self.json else sys.stdout
        return terminal.console(stderr=self.json, color=self.color and stream.isatty())

    def show(self, value: object, show: Callable[[Console], None]) -> None:
        """Give *value* to programs as one JSON document where they asked for it, and *show* it to people."""
        data = to_json(value)
        if self.json_into:
            self.write_output(self.json_into, data.encode())
        if self.json:
            sys.stdout.write(data)
            sys.stdout.flush()
        elif not self.quiet:
            show(self.console)

    def report_error(self, error: ReconcileError) -> None:
        """Tell of *error* where programs asked for JSON: after the events of a run, in place of the document of another command."""
        if self._has_no_settings and isinstance(error, LockMismatch | SettingsError) and not isinstance(error, UntrustedFile):
            error.hint += f"; no {CONFIG_NAME} is here or above: `reconcile init` writes one, and --config names another"
        if self.json_into:
            with contextlib.suppress(OSError), self.json_into.open("ab" if self._streamed else "wb") as file:
                file.write(_error_json(error) + b"\n")

    @contextlib.contextmanager
    def reporter(self, *, stream: bool = True) -> Iterator[Reporter]:
        """
        Give a listener for a run's events: moving lines on a terminal, plain ones elsewhere, JSON where programs asked for it.

        Raises:
            OSError: the run is over, and standard output or the file did not take all that there was to say of it.
        """
        gc.enable()  # a run may take hours
        with contextlib.ExitStack() as stack:
            people = None if self.json and stream else stack.enter_context(self._lines())
            output = self._events(sys.stdout) if self.json and stream else None
            into = self._events(stack.enter_context(self._opened(self.json_into))) if self.json_into and stream else None
            listeners = [one for one in (people, output, into) if one is not None]

            def tell(event: Event) -> None:
                for listener in listeners:
                    listener(event)

            yield tell
            said = output or (None if self.json else people)
            if said and said.failure:
                raise said.failure
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
            with _named(path):  # what was not written yet is written now, or not
                file.close()

    def _lines(self) -> EventLines:
        from reconciler.report import terminal

        to = self.console
        kind = terminal.ProgressBars if to.is_terminal and not self.quiet else terminal.EventLines
        return kind(to, quiet=self.quiet, verbose=self.verbose)

    @property
    def is_interactive(self) -> bool:
        """Whether there is somebody to ask."""
        return not self.json and sys.stdin.isatty() and sys.stdout.isatty()

    def confirm(self, question: str) -> None:
        """Ask on a terminal; raises what ends the command where the answer is no."""
        if not click.confirm(question, default=False):
            click.echo("nothing was done", err=True)
            raise click.exceptions.Exit(130)

    def require_confirmation(self, question: str) -> None:
        """
        Ask on a terminal, and take nothing else for an answer.

        Raises:
            UsageError: there is none, or programs read.
        """
        if not self.is_interactive:
            raise UsageError(f"there is nobody to ask: {question}", hint="say so with --yes")
        self.confirm(question)


def to_json(value: object) -> str:
    """Return *value* as a JSON document that people can read, too."""
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
def _naming_the_way_out(found: Path | None) -> Iterator[None]:
    """Add to the refusal of a file that was *found* how the caller can use it all the same."""
    try:
        yield
    except UntrustedFile as error:
        named = f"--config {found}" if found else f"--config FILE, with settings that `reconcile init` writes ({CONFIG_NAME})"
        hint = f"{error.hint}; or, if you trust whoever can change these files, name the settings: {named}"
        raise UntrustedFile(error.message, hint=hint) from None


def common_options(*, json: bool = True) -> Callable[[_F], _F]:
    """Add the options that every command of the node has; the command gets a ``Shell`` as its first argument."""

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
                said = context.explain(error)
                context.report_error(said)
                raise said from None

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__dict__.update(command.__dict__)
        wrapped: Any = run
        path = click.Path(path_type=Path, dir_okay=False)
        options = [
            click.option("-v", "--verbose", is_flag=True, help="Say more."),
            click.option("-q", "--quiet", is_flag=True, help="Say only what went wrong."),
            click.option("--color/--no-color", default=True, help="Colour on a terminal (NO_COLOR is heard too)."),
            click.option("--config", type=path, help="The settings' file, else $RECONCILE_CONFIG, else the nearest above."),
        ]
        if json:
            options += [
                click.option("--json-into", type=path, metavar="FILE", help="JSON into FILE, people's text here."),
                click.option("--json", is_flag=True, help="JSON on standard output, people's text on standard error."),
            ]
        for option in options:
            wrapped = option(wrapped)
        result: _F = wrapped
        return result

    return decorate


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say of which file the system speaks: of writes it does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


#: What a write says of a disk, a quota or a device that takes no more.
_UNWRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


def from_os_error(error: OSError) -> StoreError:
    """Return what the system refused, as an error of ours."""
    where = error.filename or ("standard output" if error.errno in _UNWRITTEN else "the system refused")
    return StoreError(f"{where}: {error.strerror or error}", hint=_NOT_YOURS if isinstance(error, PermissionError) else "")


def print_error(error: ReconcileError, *, json: bool) -> None:
    """Tell of an error: what, why and what to do next; what cannot be told here is told by the exit code."""
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
