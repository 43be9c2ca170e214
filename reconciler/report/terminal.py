"""
Text for people: tables, and the progress of a run.

On a terminal each model that is worked on has a progress bar, below one for all downloads. In a pipe or a CI log there are plain lines for
the important events, one about the downloads at times, and no terminal codes. Progress is drawn at most eight times per second.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, cast

from msgspec import UnsetType

from reconciler.core import units
from reconciler.core.events import (
    BlobReady,
    Event,
    FetchProgress,
    HashProgress,
    Incident,
    ModelDone,
    ModelPhase,
    Notice,
    RunEnded,
    RunStarted,
    Swapped,
)
from reconciler.core.plan import ModelChange, Plan
from reconciler.core.text import printable
from reconciler.ports import TestReport
from reconciler.report import plain
from reconciler.report.events import sentence, short
from reconciler.report.totals import LineTimer, Totals

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

#: A mark for each state, because colour must not be the only sign.
_MARKS = {"active": "●", "inactive": "○", "pending": "◌", "failed": "✗", "archived": "▪", "absent": "·"}
_STYLES = {"active": "green", "inactive": "dim", "pending": "yellow", "failed": "bold red", "archived": "blue", "absent": "dim"}
#: Of a test job's report, people get so many files of a kind, and so many of the engine's last lines; the JSON has them all.
_FILES, _ENGINE_LINES = 20, 12
#: A digest's digits. People get the first twelve; `-v` and the JSON have them all.
_DIGITS = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52,116}\b")
#: The key of the progress bar for hashing, beside models' ids, which all have a colon.
_HASHING = "hashing"
#: ... and of the one for all downloads.
_ALL = "all downloads"
_OPS = {
    "install": "+", "restore": "+", "enable": "+", "repair": "~", "retest": "~", "disable": "-", "archive": "-", "remove": "-",
    "reject": "!", "keep": " ",
}  # fmt: skip
_OP_STYLES = {"+": "green", "~": "yellow", "-": "red", "!": "magenta", " ": "dim"}


class ModelLine(Protocol):
    """A model as ``models`` shows it."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def state(self) -> str: ...  # noqa: D102
    @property
    def reason(self) -> str: ...  # noqa: D102
    @property
    def bytes(self) -> int: ...  # noqa: D102
    @property
    def total_bytes(self) -> int: ...  # noqa: D102
    @property
    def here_bytes(self) -> int: ...  # noqa: D102
    @property
    def attempts(self) -> int: ...  # noqa: D102


def console(*, stderr: bool, color: bool) -> Console:
    """Return the console for people; without *color*, it writes no terminal codes."""
    if not color:
        return cast("Console", plain.PlainLines(stderr=stderr))  # it has the methods that are used here
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def plan(to: Console, made: Plan, *, verbose: bool = False) -> None:
    """Print a plan: the changes, then their cost. With *verbose*, also models that do not change."""
    shown = [change for change in made.models if verbose or change.op != "keep" or not change.reason.startswith("up-to-date")]
    if shown:
        to.print(_changes(sorted(shown, key=lambda one: (not one.changes, one.id)), made.gpu_bytes))
    for drifted in made.drift:
        to.print(f"drift: {printable(drifted)}", style="yellow", markup=False)
    to.print(cost(made), markup=False)
    for warning in made.warnings:
        to.print(f"warning: {printable(warning)}", style="bold yellow", markup=False)


def _changes(shown: list[ModelChange], gpu_bytes: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for change in shown:
        sign = _OPS[change.op]
        style = _OP_STYLES[sign]
        size = units.human_size(change.download_bytes) if change.download_bytes else ""
        named = (Text(sign, style), Text(change.id, "bold"), Text(change.op, style), _path(change), Text(printable(change.reason)))
        table.add_row(*named, size, gpu_need(change, gpu_bytes))
    return table


def gpu_need(change: ModelChange, gpu_bytes: int) -> str:
    """Return what a model that will be loaded needs of the GPU memory that it may have, as "needs 6.1 GiB of 8.0 GiB"."""
    return f"needs {units.human_size(change.gpu_memory)} of {units.human_size(gpu_bytes)}" if change.gpu_memory else ""


def _path(change: ModelChange) -> str:
    return change.from_ if change.from_ == change.to else f"{change.from_} → {change.to}"


def cost(made: Plan) -> str:
    """Return the last line of a plan: the number of changes of each kind, and the bytes."""
    if not made.changes:
        return f"No changes: {made.summary['keep']} unchanged{_rejected(made)}."
    counts = ", ".join(f"{count} to {op}" for op, count in made.summary.items() if count and op in _OPS and op not in {"keep", "reject"})
    download = f"{units.human_size(made.summary['download_bytes'])} to download"
    needed = f"{units.human_size(made.disk.needed)} of disk needed, {units.human_size(made.disk.free)} free"
    return f"Plan: {counts or 'finish the interrupted run'}{_rejected(made)}; {download}, {needed}."


def _rejected(made: Plan) -> str:
    return f", {made.summary['reject']} that this node cannot run" if made.summary["reject"] else ""


def models(to: Console, shown: Iterable[ModelLine]) -> None:
    """Print models with their states."""
    rows = [_row(model) for model in shown]
    if isinstance(cast("object", to), plain.PlainLines):
        plain.print_columns(to, [(f"{_MARKS[state]} {state}", *rest) for state, *rest in rows])
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for state, model, size, reason in rows:
        table.add_row(Text(f"{_MARKS[state]} {state}", _STYLES[state]), Text(model, "bold"), size, Text(reason))
    to.print(table)


def _row(model: ModelLine) -> tuple[str, str, str, str]:
    size = f"{units.human_size(model.here_bytes)} of {units.human_size(model.total_bytes)}" if _is_partial(model) else ""
    size = size or (units.human_size(model.bytes) if model.bytes else "")
    tries = f" (attempt {model.attempts})" if model.attempts else ""
    return model.state, model.id, size, _DIGITS.sub(r"\1…", printable(model.reason)) + tries


def _is_partial(model: ModelLine) -> bool:
    return 0 < model.here_bytes < model.total_bytes


class ModelDetails(ModelLine, Protocol):
    """A model as ``model_details`` shows it."""

    @property
    def last_error(self) -> str | None: ...  # noqa: D102
    @property
    def quarantine(self) -> str | None: ...  # noqa: D102
    @property
    def test(self) -> TestReport | UnsetType | None: ...  # noqa: D102


def model_details(to: Console, model: ModelDetails, store: Path, again: str) -> None:
    """Print a model's last test job, its last error, where in *store* it is quarantined, and when it is tried *again*."""
    if isinstance(model.test, TestReport):
        _test_report(to, model.test)
    if model.attempts:
        to.print(f"attempts: {model.attempts}", markup=False)
    if model.last_error:
        to.print(f"last error: {printable(model.last_error)}", markup=False)
    if model.quarantine:
        to.print(f"quarantined: {store / model.quarantine}", markup=False)
    if is_retried(model):
        to.print(f"next try: {again}", markup=False)


def is_retried(model: ModelLine) -> bool:
    """Return whether the next run tries again what this one could not do for *model*."""
    return model.state in {"failed", "pending"} or model.reason.startswith("source-failed")


def _test_report(to: Console, report: TestReport) -> None:
    """Print the result of a model's last test job."""
    device, rate = report.device or "no device", report.tokens_per_second
    gpu = f", {report.gpu_layers} layers on the GPU, {units.human_size(report.gpu_memory_used)} used" if report.gpu_layers else ""
    lines = [
        f"test job: {report.verdict}{': ' + printable(report.reason) if report.reason else ''}",
        f"  tested on {device}{gpu}, {report.engine} {report.engine_version}, sandbox {report.sandbox or 'none'}",
        f"  loaded in {report.load_seconds:.2f}s, ran for {report.run_seconds:.2f}s, {report.tokens} tokens, {rate:.1f} tokens/s",
    ]
    if report.compared:
        where = "its embedding" if report.dimension else units.count(report.compared, "position")
        lines.append(f"  computes what the network signed: compared at {where}")
    if report.dimension:
        lines.append(f"  embedding of {report.dimension} components")
    if report.text:
        lines.append(f"  answer: {printable(report.text)[:200]}")
    lines += _file_lines("exercised", report.exercised) + _file_lines("not exercised", report.not_exercised)
    if report.stderr:
        last = [line.strip() for line in report.stderr.splitlines() if line.strip()][-_ENGINE_LINES:]
        lines += ["  the engine's last lines (all of them: --json, or its quarantine record):"]
        lines += [f"    {printable(line)[:200]}" for line in last]
    for line in lines:
        to.print(line, markup=False)


def _file_lines(what: str, files: tuple[str, ...]) -> list[str]:
    if not files:
        return []
    more = f" and {len(files) - _FILES:,} more" if len(files) > _FILES else ""
    return [f"  {what}: {printable(', '.join(files[:_FILES]))}{more}"]


class EventLines:
    """A reporter for logs: one line of text for each important event."""

    def __init__(self, to: Console, *, quiet: bool = False, verbose: bool = False) -> None:
        self._console = to
        self._quiet = quiet
        self._verbose = verbose
        self._totals = Totals()
        self._line_timer = LineTimer()
        #: The first failed write, after which nothing more is printed.
        self.failure: OSError | None = None

    def __call__(self, event: Event, /) -> None:
        """Print one event, if it is important enough."""
        self._totals.update(event)
        if isinstance(event, RunStarted):
            self._line_timer.restart()
        if self.failure is None and (self._wanted(event) or self._is_progress_due(event)):
            line = f"downloading: {self._totals.text}" if isinstance(event, FetchProgress) else sentence(event)
            try:
                self._console.print(line if self._verbose else _DIGITS.sub(r"\1…", line), markup=False, style=_style(event))
            except OSError as error:  # the reader has gone, or the disk is full: the run continues
                self.failure = error

    def _is_progress_due(self, event: Event) -> bool:
        """Whether a line about the downloads is due now; a terminal has bars in its place."""
        return isinstance(event, FetchProgress) and not self._quiet and self._line_timer.is_due(self._totals, time.monotonic())

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
    """A reporter for a terminal: a progress bar for each model that is worked on, below the lines of ``EventLines``."""

    def __init__(self, to: Console, *, quiet: bool = False, verbose: bool = False) -> None:
        super().__init__(to, quiet=quiet, verbose=verbose)
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        # The text never shrinks; the bar gives way first, then the name is cut: at 60 columns the bytes and the time left are still whole.
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis", min_width=8)),
            *([BarColumn(bar_width=24)] if to.width >= 110 else [BarColumn(bar_width=8)] if to.width >= 80 else []),
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=to, transient=True, refresh_per_second=8, expand=True,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        #: The models that wait for a blob, by its digest: bars are labelled with models, which people know.
        self._waiting: dict[str, list[str]] = {}
        self._guard = threading.Lock()

    def __call__(self, event: Event, /) -> None:
        """Update a progress bar, or print a line."""
        with self._guard:
            match event:
                case FetchProgress() | HashProgress():
                    self._totals.update(event)
                    self._move(event)
                    self._show_total()
                    return
                case BlobReady():
                    self._end(event.digest)
                case ModelPhase() if event.phase == "fetching":
                    self._waiting.setdefault(event.detail, []).append(event.model)
                case ModelPhase() if event.phase in {"unpacking", "testing", "archiving"}:
                    self._end(event.model)
                    self._tasks[event.model] = self._progress.add_task(event.model, total=None, text=event.phase)
                    return
                case ModelPhase():
                    self._end(event.model)
                case ModelDone():
                    for key in (event.model, *(blob for blob, models in self._waiting.items() if event.model in models)):
                        self._end(key)
                case RunEnded():
                    self._waiting.clear()
                    self._end(_ALL)
                case _:
                    pass
        super().__call__(event)

    def _move(self, event: FetchProgress | HashProgress) -> None:
        if isinstance(event, HashProgress):
            key, names, text = _HASHING, _HASHING, f"{units.human_size(event.done)} of {units.human_size(event.total)}"
        else:
            key, names, text = event.digest, ", ".join(self._waiting.get(event.digest, [])[:2]) or short(event.digest), _fetching(event)
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(names, total=event.total, text="")
        self._progress.update(self._tasks[key], completed=event.done, text=text)
        if key == _HASHING and event.done >= event.total:
            self._end(key)

    def _show_total(self) -> None:
        """Show one bar for all downloads, above the others, where there are several."""
        if len(self._tasks) > 1 and _ALL not in self._tasks and self._totals.total:
            self._tasks[_ALL] = self._progress.add_task("all downloads", total=self._totals.total, text="")
        if _ALL in self._tasks:
            self._progress.update(self._tasks[_ALL], completed=self._totals.done, total=self._totals.total, text=self._totals.text)

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
    """Return the bytes, the rate, the time left at that rate, and the source's host: what matters most first, since the end may be cut."""
    size = f"{units.human_size(event.done)} of {units.human_size(event.total)}"
    if event.done >= event.total:
        return f"{size}  verifying"
    left = f"  {units.human_size(event.rate)}/s  {units.human_time((event.total - event.done) / event.rate)} left" if event.rate else ""
    resumed = f"  {units.human_size(event.resumed)} resumed" if event.resumed else ""
    return f"{size}{left}{resumed}  {printable(event.source).partition('://')[2].partition('/')[0]}"
