"""
People's view: tables, and progress while a run goes on.

On a terminal each model has a line that moves; in a pipe or a CI log there are plain lines, one for what matters, and no terminal
codes. Progress is drawn at most ten times a second.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, cast

from msgspec import UnsetType

from reconciler.core import units
from reconciler.core.plan import ModelChange, Plan
from reconciler.ports import (
    BlobReady,
    Event,
    FetchProgress,
    HashProgress,
    Incident,
    ModelDone,
    ModelPhase,
    Notice,
    RunEnded,
    Swapped,
    TestReport,
)
from reconciler.report.events import escape, sentence, short

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

#: Two columns of state names read best with one mark each; colour is never the only sign.
_MARKS = {"active": "●", "inactive": "○", "pending": "◌", "failed": "✗", "archived": "▪", "absent": "·"}
_STYLES = {"active": "green", "inactive": "dim", "pending": "yellow", "failed": "bold red", "archived": "blue", "absent": "dim"}
_PIPE_WIDTH = 400
#: A digest's digits; people read the first twelve, `-v` and the JSON have them all.
_DIGITS = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52,116}\b")
#: Beside models' ids, none of which is without a colon.
_HASHING = "hashing"
_OPS = {
    "install": "+", "restore": "+", "enable": "+", "repair": "~", "retest": "~", "disable": "-", "archive": "-", "remove": "-",
    "reject": "!", "keep": " ",
}  # fmt: skip
_OP_STYLES = {"+": "green", "~": "yellow", "-": "red", "!": "magenta", " ": "dim"}


class ModelLine(Protocol):
    """What a status line shows of a model."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def state(self) -> str: ...  # noqa: D102
    @property
    def reason(self) -> str: ...  # noqa: D102
    @property
    def bytes(self) -> int: ...  # noqa: D102
    @property
    def attempts(self) -> int: ...  # noqa: D102


class PlainLines:
    """Where nobody sees colours. What is text goes out as it is; rich, which takes longer to load than a plan to make, is for tables."""

    is_terminal = False

    def __init__(self, *, stderr: bool) -> None:
        self._stderr = stderr

    def print(self, *what: object, markup: bool = False, style: str = "") -> None:
        """Print *what* as one line, without its *style*."""
        del markup
        stream = sys.stderr if self._stderr else sys.stdout
        if all(isinstance(one, str) for one in what):
            stream.write(f"{' '.join(map(str, what))}\n")
            return
        from rich.console import Console

        # In a pipe nobody sees a width: lines stay whole, so that grep finds what it looks for.
        to = Console(file=stream, no_color=True, highlight=False, soft_wrap=True, force_terminal=False, width=_PIPE_WIDTH)
        to.print(*what, style=style or None)


def console(*, stderr: bool, color: bool) -> Console:
    """Return where people's text goes; without *color*, no terminal codes at all."""
    if not color:
        return cast("Console", PlainLines(stderr=stderr))  # as much of one as is used here
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def plan(to: Console, made: Plan, *, verbose: bool = False) -> None:
    """Show a plan: what changes, then what it costs; what stays as it is too, if *verbose*."""
    shown = [change for change in made.models if verbose or change.op != "keep" or not change.reason.startswith("up-to-date")]
    if shown:
        to.print(_changes(sorted(shown, key=lambda one: (not one.changes, one.id))))
    for drifted in made.drift:
        to.print(f"drift: {escape(drifted)}", style="yellow", markup=False)
    to.print(cost(made), markup=False)
    for warning in made.warnings:
        to.print(f"warning: {escape(warning)}", style="bold yellow", markup=False)


def _changes(shown: list[ModelChange]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for change in shown:
        sign = _OPS[change.op]
        style = _OP_STYLES[sign]
        size = units.human_size(change.download_bytes) if change.download_bytes else ""
        table.add_row(Text(sign, style), Text(change.id, "bold"), Text(change.op, style), _path(change), Text(escape(change.reason)), size)
    return table


def _path(change: ModelChange) -> str:
    return change.from_ if change.from_ == change.to else f"{change.from_} → {change.to}"


def cost(made: Plan) -> str:
    """Return the last line of a plan: how many of what, and the bytes."""
    if not made.changes:
        return f"No changes: {made.summary['keep']} as they should be{_rejected(made)}."
    counts = ", ".join(f"{count} to {op}" for op, count in made.summary.items() if count and op in _OPS and op not in {"keep", "reject"})
    download = f"{units.human_size(made.summary['download_bytes'])} to download"
    needed = f"{units.human_size(made.disk.needed)} of disk needed, {units.human_size(made.disk.free)} free"
    return f"Plan: {counts or 'finish what was cut short'}{_rejected(made)}; {download}, {needed}."


def _rejected(made: Plan) -> str:
    return f", {made.summary['reject']} that this node cannot run" if made.summary["reject"] else ""


def models(to: Console, shown: Iterable[ModelLine]) -> None:
    """Show models with their states."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for model in shown:
        size = units.human_size(model.bytes) if model.bytes else ""
        tries = f" (attempt {model.attempts})" if model.attempts else ""
        state = Text(f"{_MARKS[model.state]} {model.state}", _STYLES[model.state])
        table.add_row(state, Text(model.id, "bold"), size, Text(_DIGITS.sub(r"\1…", escape(model.reason)) + tries))
    to.print(table)


class ModelDetails(ModelLine, Protocol):
    """What is shown of one model that was asked for by name."""

    @property
    def last_error(self) -> str | None: ...  # noqa: D102
    @property
    def quarantine(self) -> str | None: ...  # noqa: D102
    @property
    def test(self) -> TestReport | UnsetType | None: ...  # noqa: D102


def model_details(to: Console, model: ModelDetails, store: Path, again: str) -> None:
    """Show one model's last test job and, if it does not serve, what happened, where it lies in *store*, and when it is tried *again*."""
    if isinstance(model.test, TestReport):
        _test_report(to, model.test)
    if model.attempts:
        to.print(f"attempts: {model.attempts}", markup=False)
    if model.last_error:
        to.print(f"last error: {escape(model.last_error)}", markup=False)
    if model.quarantine:
        to.print(f"quarantined: {store / model.quarantine}", markup=False)
    if model.state in {"failed", "pending"}:
        to.print(f"next try: {again}", markup=False)


def _test_report(to: Console, report: TestReport) -> None:
    """Show how a model's last test job ended."""
    device = report.device or "no device"
    gpu = f", {report.gpu_layers} layers on the GPU, {units.human_size(report.gpu_memory_used)} used" if report.gpu_layers else ""
    lines = [
        f"test job: {report.verdict}{': ' + escape(report.reason) if report.reason else ''}",
        f"  tested on {device}{gpu}, {report.engine} {report.engine_version}, sandbox {report.sandbox or 'none'}",
        f"  loaded in {report.load_seconds:.2f}s, {report.tokens} tokens, {report.tokens_per_second:.1f} tokens/s",
    ]
    if report.dimension:
        lines.append(f"  embedding of {report.dimension} components")
    if report.text:
        lines.append(f"  answer: {escape(report.text)[:200]}")
    for line in lines:
        to.print(line, markup=False)


class EventLines:
    """A reporter for logs: one plain line for each thing that matters."""

    def __init__(self, to: Console, *, quiet: bool = False, verbose: bool = False) -> None:
        self._console = to
        self._quiet = quiet
        self._verbose = verbose
        #: Why nothing more is printed.
        self.failure: OSError | None = None

    def __call__(self, event: Event, /) -> None:
        """Print one event, if it is worth a line here."""
        if self._wanted(event) and self.failure is None:
            said = sentence(event)
            try:
                self._console.print(said if self._verbose else _DIGITS.sub(r"\1…", said), markup=False, style=_style(event))
            except OSError as error:  # nobody reads any more: the run goes on
                self.failure = error

    def _wanted(self, event: Event) -> bool:
        match event:
            case FetchProgress() | HashProgress():
                return False
            case ModelPhase() if event.phase == "fetching":
                return self._verbose
            case Notice():
                return event.level == "warning" or (self._verbose and not self._quiet)
            case Incident():
                return True
            case ModelDone():
                return event.state == "failed" or not self._quiet
            case _:
                return not self._quiet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


def _style(event: Event) -> str:
    if isinstance(event, Incident) or (isinstance(event, ModelDone) and event.state == "failed"):
        return "red"
    if isinstance(event, Notice) and event.level == "warning":
        return "yellow"
    return "bold" if isinstance(event, RunEnded | Swapped) else ""


class ProgressBars(EventLines):
    """A reporter for a terminal: a moving line for each model at work, plain lines above them."""

    def __init__(self, to: Console, *, quiet: bool = False, verbose: bool = False) -> None:
        super().__init__(to, quiet=quiet, verbose=verbose)
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[said]}"), console=to, transient=True,
            refresh_per_second=8,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        #: The models that wait for a blob, by its digest: people know models, not digests.
        self._waiting: dict[str, list[str]] = {}
        self._guard = threading.Lock()

    def __call__(self, event: Event, /) -> None:
        """Move a line, or print one."""
        with self._guard:
            match event:
                case FetchProgress() | HashProgress():
                    self._move(event)
                case BlobReady():
                    self._end(event.digest)
                case ModelPhase() if event.phase == "fetching":
                    self._waiting.setdefault(event.detail, []).append(event.model)
                case ModelPhase() if event.phase in {"unpacking", "testing", "archiving"}:
                    self._end(event.model)
                    self._tasks[event.model] = self._progress.add_task(event.model, total=None, said=event.phase)
                    return
                case ModelPhase():
                    self._end(event.model)
                case ModelDone():
                    for key in (event.model, *(blob for blob, models in self._waiting.items() if event.model in models)):
                        self._end(key)
                case RunEnded():
                    self._waiting.clear()
                case _:
                    pass
        super().__call__(event)

    def _move(self, event: FetchProgress | HashProgress) -> None:
        if isinstance(event, HashProgress):
            key, names, said = _HASHING, _HASHING, f"{units.human_size(event.done)} of {units.human_size(event.total)}"
        else:
            key, names, said = event.digest, ", ".join(self._waiting.get(event.digest, [])[:2]) or short(event.digest), _fetching(event)
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(names, total=event.total, said="")
        self._progress.update(self._tasks[key], completed=event.done, said=said)
        if key == _HASHING and event.done >= event.total:
            self._end(key)

    def _end(self, key: str) -> None:
        task = self._tasks.pop(key, None)
        if task is not None:
            self._progress.remove_task(task)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()


def _fetching(event: FetchProgress) -> str:
    """Return bytes, rate, the time that is left at it, and the source's host."""
    size = f"{units.human_size(event.done)} of {units.human_size(event.total)}"
    if event.done >= event.total:
        return f"verifying  {size}"
    left = f"  {units.human_size(event.rate)}/s  {units.human_time((event.total - event.done) / event.rate)} left" if event.rate else ""
    return f"fetching  {size}{left}  {escape(event.source).partition('://')[2].partition('/')[0]}"
