"""Runs the test job of a model that a network is about to list, and returns what this machine computed, for nodes to compare."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from msgspec import UNSET

from reconciler.core import lock, units
from reconciler.core.errors import PublishError
from reconciler.core.snapshot import Answer, Model
from reconciler.ports import TestJob
from reconciler.runtime.smoke_test import SandboxedTester
from reconciler.settings import Runtimes


def record(model: Model, files: Mapping[str, Path]) -> Answer:
    """
    Return what the test job of *model* computes here; *files* are its artifacts, by path.

    Raises:
        PublishError: the test job did not pass here, or cannot run.
    """
    with tempfile.TemporaryDirectory(prefix="reconcile-") as folder:
        tree = Path(folder, "tree")
        for path, source in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            _put(source, tree / path)
        tester = SandboxedTester(
            Path(folder, "cache"), sandbox="auto", timeout_seconds=units.seconds(model.smoke.timeout), runtimes=Runtimes()
        )
        report = tester.test(
            TestJob(
                model=model.id,
                tree=tree,
                entrypoint=model.entrypoint,
                runtime=model.runtime,
                smoke=model.smoke,
                roles=lock.compile_model(model).file_roles,
                record=True,
            )
        )
    if report.verdict != "passed" or report.answer is UNSET:
        raise PublishError(f"no answer was recorded: {report.reason or 'this engine tells none'}", hint="leave --record-answer out")
    return report.answer


def _put(source: Path, target: Path) -> None:
    """Link *source* to *target*, or copy it across file systems: a sandbox that is given the tree sees no link out of it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
