"""
The test job of a listed model, run on the operator's machine before a network signs: the same job in the same sandbox as on a node.

Rules that hold here:

1. The files are those that the snapshot lists: each is hashed before the job, wherever it comes from.
2. Nothing is kept: what is fetched lies in a temporary folder, which goes with the command.
3. What the job computes here may be recorded as the known answer, which nodes compare with theirs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec import UNSET, structs

from reconciler.core import digest as digests
from reconciler.core import lock, units
from reconciler.core.errors import PublishError
from reconciler.core.events import Event
from reconciler.core.snapshot import Answer, Model, Snapshot
from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.fetch.settings import FetchSettings
from reconciler.ports import FetchFailed, TestJob, TestReport, Want
from reconciler.publish import artifacts
from reconciler.runtime.smoke_test import SandboxedTester
from reconciler.settings import Runtimes

_MOST_BYTES = 2 << 40


def run(model: Model, files: Mapping[str, Path], *, runtimes: Runtimes, record: bool = False) -> TestReport:
    """Return how the test job of *model* ends here; *files* are its artifacts, by path."""
    with TemporaryDirectory(prefix="reconcile-") as folder:
        tree = Path(folder, "tree")
        for path, source in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            _put(source, tree / path)
        seconds = units.seconds(model.smoke.timeout)
        tester = SandboxedTester(Path(folder, "cache"), sandbox="auto", timeout_seconds=seconds, runtimes=runtimes)
        return tester.test(
            TestJob(
                model=model.id,
                tree=tree,
                entrypoint=model.entrypoint,
                runtime=model.runtime,
                smoke=model.smoke,
                gpu_memory=model.gpu_memory,
                memory=model.memory,
                roles=lock.compile_model(model).file_roles,
                record=record,
            )
        )


def record_answer(model: Model, files: Mapping[str, Path]) -> Answer:
    """
    Return what the test job of *model* computes here; *files* are its artifacts, by path.

    Raises:
        PublishError: the test job did not pass here, or cannot run.
    """
    model = structs.replace(model, gpu_memory=0)  # an answer holds on every device, and whoever publishes may have no GPU
    report = run(model, files, runtimes=Runtimes(), record=True)
    if report.verdict != "passed" or report.answer is UNSET:
        raise PublishError(f"no answer was recorded: {report.reason or 'this engine tells none'}", hint="leave --record-answer out")
    return report.answer


@contextlib.contextmanager
def files_of(found: Snapshot, model: Model, sources: tuple[Path, ...], download: FetchSettings) -> Iterator[dict[str, Path]]:
    """
    Give the files of *model*, which *found* lists, by path: from *sources*, folders and files on this machine, or else from its URLs.

    Raises:
        PublishError: one is missing, is not the listed one, or is an archive.
        FetchError: no source gives it.
    """
    if packed := next((one.path for one in model.artifacts if one.unpack), ""):
        raise PublishError(f"{packed} is an archive, which only a node unpacks", hint="test it on a node")
    if sources:
        here = {one.path: _find(one.path, sources) for one in model.artifacts}
        for one in model.artifacts:
            _check(one.digest, here[one.path])
        yield here
        return
    with TemporaryDirectory(prefix="reconcile-") as folder:
        yield _fetch(found, model, Path(folder), download)


def _find(path: str, sources: tuple[Path, ...]) -> Path:
    for source in sources:
        place = source / path if source.is_dir() else source
        if place.is_file() and (source.is_dir() or place.name == path.rpartition("/")[2]):
            return place
    raise PublishError(f"no file {path!r} is among what was named", hint="name the folder with its files, or nothing to fetch them")


def _check(digest: str, place: Path) -> None:
    found = artifacts.measure(
        artifacts.read_chunks(place, max_bytes=_MOST_BYTES), algorithm=digests.parse(digest)[0], may_be_empty=True
    ).digest
    if found != digest:
        raise PublishError(f"{place} is {found}, and {digest} is listed")


def _fetch(found: Snapshot, model: Model, folder: Path, download: FetchSettings) -> dict[str, Path]:
    wants = {one.digest: Want(digest=one.digest, size=one.size, sources=one.urls) for one in model.artifacts}
    chosen = structs.replace(download, signed_redirects=found.sources.redirects or {})
    kept: dict[str, Path] = {}
    with contextlib.closing(Aria2Fetcher(folder / "staging", chosen)) as fetcher:
        for outcome in fetcher.fetch(list(wants.values()), _deaf):
            if isinstance(outcome, FetchFailed):
                raise outcome.error
            kept[outcome.digest] = folder / f"blob{len(kept)}"
            _put(outcome.path, kept[outcome.digest])
    return {one.path: kept[one.digest] for one in model.artifacts}


def _deaf(event: Event) -> None:
    del event


def _put(source: Path, target: Path) -> None:
    """Link *source* to *target*, or copy it across file systems: a sandbox that is given the tree sees no link out of it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
