"""Test jobs: which engine, in which sandbox, and what its end says about the model."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from reconciler.core import units
from reconciler.core.errors import SandboxUnavailable
from reconciler.core.node import Gpu
from reconciler.ports import TestJob, TestReport, Verdict
from reconciler.runtime import devices, engines
from reconciler.runtime import result as verdicts
from reconciler.runtime.engines import Engine
from reconciler.sandbox import choose, supervision
from reconciler.sandbox.process import SandboxJob
from reconciler.sandbox.supervision import OWN_FAULT, ProcessResult, printable
from reconciler.settings import Runtimes

#: What an engine says when there is not enough memory, of whichever kind.
_SHORT = ("out of memory", "failed to allocate", "unable to allocate", "cannot allocate memory", "not enough memory", "bad_alloc")
#: What it says when the device, and not the model, is at fault.
_BUSY = ("cuda error", "no cuda-capable", "hip error", "device lost")
#: Engines repack weights, so they may need them twice; and something for the context that a test job gets.
_MEMORY_BYTES = 4 << 30

_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Amount = Annotated[float, Meta(ge=0, le=1e15)]
_Said = Annotated[str, Meta(max_length=4096)]


class _Word(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a child may say; whatever else it says, all of it counts for nothing."""

    nonce: str
    verdict: Verdict
    reason: _Said = ""
    load_seconds: _Amount = 0.0
    run_seconds: _Amount = 0.0
    tokens: _Count = 0
    tokens_per_second: _Amount = 0.0
    text: _Said = ""
    token_ids: Annotated[tuple[_Count, ...], Meta(max_length=4096)] = ()
    dimension: _Count = 0
    gpu_layers: _Count = 0
    gpu_memory_used: _Count = 0
    engine_version: Annotated[str, Meta(max_length=64)] = ""


class SandboxedTester:
    """
    Runs test jobs with the engines that are known here.

    *cache* keeps what a probe of the sandboxes found; no test job runs longer than *timeout_seconds*; *runtimes* is what the
    settings say about each engine.
    """

    def __init__(self, cache: Path, *, sandbox: choose.Setting, timeout_seconds: float, runtimes: Runtimes) -> None:
        self._cache = cache
        self._sandbox = sandbox
        self._timeout_seconds = timeout_seconds
        self._runtimes = runtimes
        self._guard = threading.Lock()
        self._running: supervision.StopSignal | None = None
        self._closed = False

    def engines(self) -> dict[str, str]:
        """Return the installed engines' versions by name."""
        return engines.installed(self._runtimes)

    def test(self, job: TestJob) -> TestReport:
        """Run *job* in a sandbox and return its report."""
        engine = engines.known().get(job.runtime.engine)
        version = engine.version(self._runtimes) if engine else None
        if engine is None or version is None:
            return _report("unable", f"the engine {job.runtime.engine} is not installed", job)
        gpus = devices.gpus()
        if job.gpu_memory and (lacking := _lacking(job, gpus)):
            return _report("unable", lacking, job)
        try:
            box = choose.choose(self._sandbox, self._cache, server=engine.server)
            cell = self._cell(job, engine, gpus)
            roomy = 0 < cell.memory_bytes <= devices.free_memory()
            with self._stoppable() as stop:
                ended = box.run(cell, stop)
        except SandboxUnavailable as error:
            return _report("unable", f"sandbox-unavailable: {error.message}", job)
        if self._closed:
            return _report("unable", "the run was stopped", job)
        if ended.setup_failed:
            choose.forget(self._cache)
        report = _judged(ended, job, roomy=roomy)
        report = msgspec.structs.replace(report, sandbox=box.mode, engine_version=report.engine_version or version)
        return _on_device(report, job, gpus)

    def close(self) -> None:
        """End the test job that runs, and each that would begin later; from any thread, and idempotent."""
        with self._guard:
            self._closed = True
            if self._running:
                self._running.set()

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[supervision.StopSignal]:
        with contextlib.closing(supervision.StopSignal()) as stop:
            with self._guard:
                self._running = stop
                if self._closed:
                    stop.set()
            try:
                yield stop
            finally:
                with self._guard:
                    self._running = None

    def _cell(self, job: TestJob, engine: Engine, gpus: tuple[Gpu, ...]) -> SandboxJob:
        limit = min(units.seconds(job.smoke.timeout), self._timeout_seconds)
        tree = job.tree.resolve()
        options = engine.options(self._runtimes)
        found = devices.nodes(gpus) if options.get("gpu_layers") != 0 else ()  # who computes on the CPU needs no driver
        document: dict[str, Any] = {
            "model": str(tree / job.entrypoint),
            "smoke": msgspec.to_builtins(job.smoke),
            "options": options,
        }
        return SandboxJob(
            module=engine.module(),
            job=document,
            seconds=limit,
            read=(tree, *engine.folders(self._runtimes)),
            devices=found,
            server=engine.server,
            memory_bytes=0 if found else 2 * _size(tree) + _MEMORY_BYTES,
        )


def _size(tree: Path) -> int:
    return sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())


def _lacking(job: TestJob, gpus: tuple[Gpu, ...]) -> str:
    """Return why no GPU can take *job* now; that is the node's state, not the model's fault."""
    if not gpus:
        return "it asks for a GPU, and none answers now"
    free = max(gpu.free_bytes for gpu in gpus)
    if free < job.gpu_memory:
        return f"the GPU is busy: {units.human_size(free)} are free, it needs {units.human_size(job.gpu_memory)}"
    return ""


def _judged(ended: ProcessResult, job: TestJob, *, roomy: bool) -> TestReport:
    """Return what the child's end says; *roomy*: the node had as much memory to give as the child was allowed."""
    last = _last_line(ended.errors)
    if ended.setup_failed:
        return _report("unable", f"sandbox-unavailable: {last}", job)
    if ended.timed_out:
        phase = verdicts.last_phase(ended.errors)
        return _report("bad", f"its test job did not end in time{f', while {phase}' if phase else ''}", job)
    if ended.word is not None:
        return _answered(ended.word, job, ended, roomy=roomy)
    if ended.signal in OWN_FAULT:
        return _report("bad", f"the engine died of {signal.Signals(ended.signal).name} with it: {last}", job)
    if ended.signal:
        return _report("unable", f"the test job was killed by signal {ended.signal}, perhaps for want of memory", job)
    return _short(ended.errors, job, roomy=roomy) or _report("bad", f"its test job ended with {ended.code} and no verdict: {last}", job)


def _answered(answer: dict[str, Any], job: TestJob, ended: ProcessResult, *, roomy: bool) -> TestReport:
    """Return the child's word as a report; a document of another shape is no word."""
    try:
        word = msgspec.convert(answer, _Word)
    except msgspec.ValidationError as error:
        return _report("bad", f"its test job answered nonsense: {error}", job)
    said = {field: getattr(word, field) for field in _Word.__struct_fields__ if field != "nonce"}
    report = TestReport(
        **said | {"engine": job.runtime.engine, "text": _encodable(word.text)[:2000], "reason": printable(word.reason)[:1000]}
    )
    if word.verdict == "passed":
        return msgspec.structs.replace(report, reason="")
    if word.verdict == "unable" or word.reason.startswith("the engine does not "):
        if short := _short(f"{ended.errors}\n{word.reason}", job, roomy=roomy):
            return short
        return msgspec.structs.replace(report, reason=f"{report.reason} ({_last_line(ended.errors, 'error')})")
    return report


def _short(errors: str, job: TestJob, *, roomy: bool) -> TestReport | None:
    """Say who is at fault for a want of memory, if that is what *errors* tell of."""
    said = errors.lower()
    if any(word in said for word in _BUSY):
        return _report("unable", f"the device could not take it now: {_last_line(errors, _found(said, _BUSY))}", job)
    if not any(word in said for word in _SHORT):
        return None
    last = _last_line(errors, _found(said, _SHORT))
    if roomy:
        return _report("bad", f"it takes more memory than a file of its size may: {last}", job)
    return _report("unable", f"the device could not take it now: {last}", job)


def _found(said: str, words: tuple[str, ...]) -> str:
    return next(word for word in words if word in said)


def _on_device(report: TestReport, job: TestJob, gpus: tuple[Gpu, ...]) -> TestReport:
    """Name what really ran it. A model that asks for a GPU and ran beside one is not tested."""
    if report.verdict != "passed":
        return report
    if job.gpu_memory and not report.gpu_layers and job.runtime.engine != "openai":
        return msgspec.structs.replace(
            report, verdict="bad", reason="it asks for a GPU and ran on the CPU: is the engine built for this GPU?", device="cpu"
        )
    return msgspec.structs.replace(report, device=gpus[0].name if report.gpu_layers and gpus else "cpu")


def _report(verdict: Verdict, reason: str, job: TestJob) -> TestReport:
    return TestReport(verdict=verdict, reason=printable(reason), engine=job.runtime.engine)


def _last_line(errors: str, word: str = "") -> str:
    """Return the last line that says something, with *word* in it if there is one."""
    lines = [line.strip() for line in errors.splitlines() if line.strip(" .\t")]
    chosen = [line for line in lines if word in line.lower()] or lines
    return printable(chosen[-1])[:300] if chosen else "it said nothing"


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()
