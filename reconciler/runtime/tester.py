"""Test jobs: which engine, in which sandbox, and what its end says about the model."""

from __future__ import annotations

import signal
from typing import Any

import msgspec

from reconciler import units
from reconciler.errors import SandboxUnavailable
from reconciler.ports import TestJob, TestReport, Verdict
from reconciler.runtime import devices, engines, sandbox
from reconciler.runtime.cell import Cell, Ended
from reconciler.runtime.engines import Engine
from reconciler.settings import Settings

#: Signals that a process sends to itself when its own code is at fault; others come from outside.
_OWN_FAULT = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP, signal.SIGXFSZ}
#: What an engine says when the device, and not the model, is short of something.
_BUSY = ("out of memory", "cuda error", "no cuda-capable", "failed to allocate", "unable to allocate", "cannot allocate memory")


class SandboxedTester:
    """Runs test jobs with the engines that are known here."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cache = settings.store_path / "cache"

    def engines(self) -> dict[str, str]:
        """Return the installed engines' versions by name."""
        return engines.installed(self._settings)

    def test(self, job: TestJob) -> TestReport:
        """Run *job* in a sandbox and return its report."""
        engine = engines.known().get(job.runtime.engine)
        version = engine.version(self._settings) if engine else None
        if engine is None or version is None:
            return _report("unable", f"the engine {job.runtime.engine} is not installed", job)
        try:
            box = sandbox.choose(self._settings.smoke.sandbox, self._cache)
        except SandboxUnavailable as error:
            return _report("unable", f"sandbox-unavailable: {error.message}", job)
        before = devices.gpus()
        ended = box.run(self._cell(job, engine))
        report = self._judged(ended, job)
        report = msgspec.structs.replace(report, sandbox=box.mode, engine_version=report.engine_version or version)
        return _on_device(report, job, before)

    def _cell(self, job: TestJob, engine: Engine) -> Cell:
        limit = min(units.seconds(job.smoke.timeout), units.seconds(self._settings.smoke.timeout))
        model = (job.tree / job.entrypoint).resolve()
        document: dict[str, Any] = {
            "model": str(model),
            "smoke": msgspec.to_builtins(job.smoke),
            "options": engine.options(self._settings),
            "gpu_memory": job.gpu_memory,
        }
        return Cell(module=engine.module(), job=document, seconds=limit, read=(job.tree.resolve(),), devices=devices.nodes())

    def _judged(self, ended: Ended, job: TestJob) -> TestReport:
        if ended.answer is not None:
            return _answered(ended.answer, job, ended)
        if ended.setup_failed:
            return _report("unable", f"sandbox-unavailable: {_last_line(ended.errors)}", job)
        if ended.timed_out:
            return _report("bad", "its test job did not end in time", job)
        if ended.signal in _OWN_FAULT:
            return _report("bad", f"the engine died of {signal.Signals(ended.signal).name} with it: {_last_line(ended.errors)}", job)
        if ended.signal:
            return _report("unable", f"the test job was killed by signal {ended.signal}, perhaps for want of memory", job)
        if _is_busy(ended.errors):
            return _report("unable", f"the device could not take it now: {_last_line(ended.errors)}", job)
        return _report("bad", f"its test job ended with {ended.code} and no verdict: {_last_line(ended.errors)}", job)


def _answered(answer: dict[str, Any], job: TestJob, ended: Ended) -> TestReport:
    """Return the child's word as a report; a document of another shape is no word."""
    known = {key: value for key, value in answer.items() if key != "nonce"} | {"engine": job.runtime.engine}
    try:
        report = msgspec.convert(known, TestReport)
    except msgspec.ValidationError as error:
        return _report("bad", f"its test job answered nonsense: {error}", job)
    report = msgspec.structs.replace(report, text=report.text[:2000], reason=report.reason[:1000])
    if report.verdict == "bad" and report.reason.startswith("the engine does not load it"):
        if _is_busy(ended.errors):
            return msgspec.structs.replace(report, verdict="unable", reason=f"the device could not take it now: {_last_line(ended.errors)}")
        return msgspec.structs.replace(report, reason=f"{report.reason} ({_last_line(ended.errors, 'error')})")
    return report


def _on_device(report: TestReport, job: TestJob, gpus: tuple[Any, ...]) -> TestReport:
    """Name what really ran it. A model that asks for a GPU and ran beside one is not tested."""
    if report.verdict != "passed":
        return report
    if job.gpu_memory and gpus and not report.gpu_layers:
        return msgspec.structs.replace(
            report, verdict="bad", reason="it asks for a GPU and ran on the CPU: is the engine built for this GPU?", device="cpu"
        )
    return msgspec.structs.replace(report, device=gpus[0].name if report.gpu_layers and gpus else "cpu")


def _report(verdict: Verdict, reason: str, job: TestJob) -> TestReport:
    return TestReport(verdict=verdict, reason=reason, engine=job.runtime.engine)


def _is_busy(errors: str) -> bool:
    said = errors.lower()
    return any(word in said for word in _BUSY)


def _last_line(errors: str, word: str = "") -> str:
    """Return the last line that says something, with *word* in it if there is one."""
    lines = [line.strip() for line in errors.splitlines() if line.strip(" .\t")]
    chosen = [line for line in lines if word in line.lower()] or lines
    return chosen[-1][:300] if chosen else "it said nothing"
