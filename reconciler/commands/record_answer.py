"""Runs the test job of a model that a network is about to list, and returns what this machine computed, for nodes to compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msgspec import UNSET, structs

from reconciler.commands import run_test_job
from reconciler.core.errors import PublishError
from reconciler.core.snapshot import Answer, Model
from reconciler.settings import Runtimes


def record(model: Model, files: Mapping[str, Path]) -> Answer:
    """
    Return what the test job of *model* computes here; *files* are its artifacts, by path.

    Raises:
        PublishError: the test job did not pass here, or cannot run.
    """
    model = structs.replace(model, gpu_memory=0)  # an answer holds on every device, and whoever publishes may have no GPU
    report = run_test_job.run(model, files, runtimes=Runtimes(), record=True)
    if report.verdict != "passed" or report.answer is UNSET:
        raise PublishError(f"no answer was recorded: {report.reason or 'this engine tells none'}", hint="leave --record-answer out")
    return report.answer
