"""Runs test jobs: chooses the engine and the sandbox, and concludes from the child's answer or end what the model is worth."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from reconciler.core import units
from reconciler.core.errors import SandboxUnavailable
from reconciler.core.node import Gpu
from reconciler.core.snapshot import Answer
from reconciler.ports import TestJob, TestReport, Verdict
from reconciler.runtime import blame, devices, engines, gpu_use, result
from reconciler.runtime.engines import Engine, OpenAI
from reconciler.runtime.gpu_use import GpuUse
from reconciler.sandbox import choose, supervision
from reconciler.sandbox.process import SandboxJob
from reconciler.sandbox.supervision import OWN_FAULT, ProcessResult, printable
from reconciler.settings import Runtimes

#: Words of engines' messages about a lack of memory, on whichever device.
_NO_MEMORY = ("out of memory", "failed to allocate", "unable to allocate", "cannot allocate memory", "not enough memory", "bad_alloc")
#: Words of their messages when the device, and not the model, is at fault.
_DEVICE_FAULT = ("cuda error", "no cuda-capable", "hip error", "device lost")
#: Beside twice the size of the files, since engines may repack weights: for the context of a test job and the engine itself.
_MEMORY_BYTES = 4 << 30
#: Bytes of the answer: its lists name files, of which a model has up to a thousand.
_ANSWER_BYTES = 1 << 20
#: A child that generates ends by itself so long before its time limit, and so tells what it had said; a tenth of a short limit.
_LAST_SECONDS = 1.0
#: The engine's own line about where a model's layers are, in the output of a child that died without an answer.
_OFFLOADED = re.compile(r"^load_tensors: offloaded (\d{1,6})/\d+ layers to GPU", re.MULTILINE)
#: For a server's child to read the files before it starts the server, and to stop it: it says itself when the server is late.
_ENDING_SECONDS = 10.0

_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Number = Annotated[float, Meta(ge=0, le=1e15)]
_Text = Annotated[str, Meta(max_length=4096)]


class _Answer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The only document that a child may answer with; any other shape makes the whole answer invalid."""

    nonce: str
    verdict: Verdict
    reason: _Text = ""
    load_seconds: _Number = 0.0
    run_seconds: _Number = 0.0
    tokens: _Count = 0
    tokens_per_second: _Number = 0.0
    text: _Text = ""
    token_ids: Annotated[tuple[_Count, ...], Meta(max_length=4096)] = ()
    dimension: _Count = 0
    gpu_layers: _Count = 0
    gpu_memory_used: _Count = 0
    engine_version: Annotated[str, Meta(max_length=64)] = ""
    exercised: Annotated[tuple[_Text, ...], Meta(max_length=4096)] = ()
    answer: Answer | UnsetType = UNSET
    compared: _Count = 0
    #: Whether a server had a GPU open, and why a server gave no answer to judge the model by.
    on_gpu: bool = False
    #: Whether the engine is built for a GPU.
    offload: bool = True
    server: blame.ServerFailure | None = None


#: Fields of the child's answer that are for us, and not for the report.
_OURS = {"nonce", "on_gpu", "offload", "server"}


def job_document(job: TestJob, options: dict[str, Any], *, seconds: float, free_bytes: int = 0, total_bytes: int = 0) -> dict[str, Any]:
    """
    Return what the worker of an engine is told of *job*, as JSON.

    It has *seconds* from now on, and GPU memory of *total_bytes*, of which *free_bytes* are free.
    """
    tree = job.tree.resolve()
    return {
        "model": str(tree / job.entrypoint),
        "tree": str(tree),
        "entrypoint": job.entrypoint,
        "roles": dict(job.roles),
        "record": job.record,
        "until": time.monotonic() + seconds - min(_LAST_SECONDS, seconds / 10),
        "name": job.model.partition(":")[0],
        "smoke": msgspec.to_builtins(job.smoke),
        "options": options,
        "gpu": {"free": free_bytes, "total": total_bytes},
    }


class SandboxedTester:
    """
    Runs test jobs with every known engine.

    *cache* is the folder in which a successful probe of a sandbox is kept. No test job runs longer than *timeout_seconds*. *runtimes* is
    the settings' table ``[runtime]``. *served* tells the digests of the trees that a server's command line has served on this node.
    """

    def __init__(
        self,
        cache: Path,
        *,
        sandbox: choose.SandboxSetting,
        timeout_seconds: float,
        runtimes: Runtimes,
        served: Callable[[str], frozenset[str]] = lambda _: frozenset(),
    ) -> None:
        self._cache = cache
        self._sandbox = sandbox
        self._timeout_seconds = timeout_seconds
        self._runtimes = runtimes
        self._served = served
        self._guard = threading.Lock()
        self._running: supervision.StopSignal | None = None
        self._closed = False

    def engines(self) -> dict[str, str]:
        """Return the installed engines' versions by name."""
        return engines.installed(self._runtimes, self._cache)

    def test(self, job: TestJob) -> TestReport:
        """Run *job* in a sandbox and return its report."""
        engine = engines.known(self._runtimes, self._cache).get(job.runtime.engine)
        version = engine.version(self._runtimes) if engine else None
        if engine is None or version is None:
            return _report("unable", f"the engine {job.runtime.engine} is not installed", job)
        use = gpu_use.of_job(devices.gpus(self._runtimes.llama_cpp.devices), self._runtimes, job.runtime.engine, server=engine.server)
        if job.gpu_memory and not use.on_cpu and (shortage := _gpu_shortage(job, use.gpus, split=self._runtimes.llama_cpp.split)):
            return _report("unable", shortage, job)
        try:
            sandbox = choose.choose(self._sandbox, self._cache, server=engine.server)
            sandbox_job = self._sandbox_job(job, engine, use)
            roomy = 0 < sandbox_job.memory_bytes <= devices.available_memory()
            began = time.monotonic()
            with self._stop_signal() as stop:
                ended = sandbox.run(sandbox_job, stop)
            seconds = time.monotonic() - began
        except SandboxUnavailable as error:
            return _report("unable", f"sandbox-unavailable: {error.message}", job)
        if self._closed:
            return _report("unable", "the run was stopped", job)
        if ended.setup_failed:
            choose.forget_probes(self._cache)
        report = self._judged(_report_of(ended, job, roomy=roomy), ended, job, engine)
        report = msgspec.structs.replace(report, sandbox=sandbox.mode, engine_version=report.engine_version or version)
        answer = ended.valid_answer or {}
        on_gpu, offload = bool(answer.get("on_gpu")), bool(answer.get("offload", True))
        seen = sandbox.mode == "bubblewrap"
        report = gpu_use.judged(report, job, use, on_gpu=on_gpu, server=engine.server, seen=seen, errors=ended.errors, offload=offload)
        return _with_files(_with_circumstances(report, ended, seconds, use.gpus), job)

    def _judged(self, report: TestReport, ended: ProcessResult, job: TestJob, engine: Engine) -> TestReport:
        """Return *report* with whose fault it is that a server failed, and of which command line."""
        command = engine.command_digest(self._runtimes) if isinstance(engine, OpenAI) else ""
        said = (ended.valid_answer or {}).get("server")
        failure = next((word for word in blame.FAILURES if word == said), None)
        if failure is not None and not _memory_shortage(ended.errors, job, roomy=False):
            proven = bool(self._served(command) - {job.digest})
            verdict, reason = blame.verdict(failure, report.reason, ended.errors, proven=proven)
            report = msgspec.structs.replace(report, verdict=verdict, reason=reason[:1000])
        return msgspec.structs.replace(report, command=command)

    def close(self) -> None:
        """End the test job that runs, and each that would begin later; from any thread, and idempotent."""
        with self._guard:
            self._closed = True
            if self._running:
                self._running.set()

    @contextlib.contextmanager
    def _stop_signal(self) -> Iterator[supervision.StopSignal]:
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

    def _sandbox_job(self, job: TestJob, engine: Engine, use: GpuUse) -> SandboxJob:
        tree, limit = job.tree.resolve(), min(units.seconds(job.smoke.timeout), self._timeout_seconds)
        total = sum(gpu.total_bytes for gpu in use.gpus)
        made = SandboxJob(
            module=engine.module(),
            job=job_document(job, engine.options(self._runtimes), seconds=limit, free_bytes=use.free_bytes, total_bytes=total),
            seconds=limit,
            read=(tree, *engine.folders(self._runtimes), *use.read),
            devices=use.devices,
            variables=use.variables,
            server=engine.server,
            memory_bytes=0 if use.devices else 2 * _size(tree) + _MEMORY_BYTES,
            answer_bytes=_ANSWER_BYTES,
        )
        return self._with_server(made, engine) if isinstance(engine, OpenAI) else made

    def _with_server(self, job: SandboxJob, engine: OpenAI) -> SandboxJob:
        """Return *job* with the room that the settings give the server; the time that it takes to start comes before that for the job."""
        chosen, most = self._runtimes.server(engine.name), self._timeout_seconds
        ready = min(units.seconds(chosen.ready_timeout), most)
        given = job.job["options"]
        times = {"ready_seconds": ready, "answer_seconds": job.seconds, "most_seconds": most}
        options = given | {"env": job.variables | given["env"]} | times
        return msgspec.structs.replace(
            job,
            job=job.job | {"options": options},
            seconds=min(ready + job.seconds, most) + _ENDING_SECONDS,
            memory_bytes=units.size(chosen.memory),
            file_bytes=units.size(chosen.file_size),
            scratch_bytes=units.size(chosen.file_size),
            shared_bytes=units.size(chosen.shm),
            processes=chosen.processes,
        )


def _size(tree: Path) -> int:
    return sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())


def _gpu_shortage(job: TestJob, gpus: tuple[Gpu, ...], *, split: bool = False) -> str:
    """Return why no GPU can take *job* now; that is the node's state, not the model's fault."""
    if not gpus:
        return "it asks for a GPU, and none answers now"
    free = sum(gpu.free_bytes for gpu in gpus) if split else max(gpu.free_bytes for gpu in gpus)
    if free < job.gpu_memory:
        return f"the GPU is busy: {units.human_size(free)} are free, it needs {units.human_size(job.gpu_memory)}"
    return ""


def _report_of(ended: ProcessResult, job: TestJob, *, roomy: bool) -> TestReport:
    """Return the report that follows from how the child *ended*; *roomy*: the node had all the memory free that the child was allowed."""
    last = _last_line(ended.errors)
    if ended.setup_failed:
        return _report("unable", f"sandbox-unavailable: {last}", job)
    if ended.timed_out:
        phase = result.last_phase(ended.errors)
        return _report("bad", f"its test job did not end in time{f', while {phase}' if phase else ''}", job)
    if ended.valid_answer is not None:
        return _report_from_answer(ended.valid_answer, job, ended, roomy=roomy)
    if ended.signal in OWN_FAULT:
        phase = result.last_phase(ended.errors)
        where = f", while {phase}" if phase.startswith(result.LOADING) else ""
        return _report("bad", f"the engine died of {signal.Signals(ended.signal).name} with it{where}: {last}", job)
    if ended.signal:
        return _report("unable", f"the test job was killed by signal {ended.signal}, perhaps because memory ran out", job)
    return _memory_shortage(ended.errors, job, roomy=roomy) or _report(
        "bad", f"its test job ended with {ended.code} and no verdict: {last}", job
    )


def _report_from_answer(answer: dict[str, Any], job: TestJob, ended: ProcessResult, *, roomy: bool) -> TestReport:
    """Return the child's answer as a report; a document of another shape fails the model."""
    try:
        found = msgspec.convert(answer, _Answer)
    except msgspec.ValidationError as error:
        return _report("bad", f"its test job answered nonsense: {error}", job)
    fields = {field: getattr(found, field) for field in _Answer.__struct_fields__ if field not in _OURS}
    report = TestReport(
        **fields | {"engine": job.runtime.engine, "text": _encodable(found.text)[:2000], "reason": printable(found.reason)[:1000]}
    )
    if found.verdict == "passed":
        return msgspec.structs.replace(report, reason="")
    if found.verdict == "unable" or "the engine does not " in found.reason:
        if found.server and not _memory_shortage(ended.errors, job, roomy=False):
            return report
        if shortage := _memory_shortage(f"{ended.errors}\n{found.reason}", job, roomy=roomy):
            return shortage
        if "the engine " not in found.reason:
            return report
        return msgspec.structs.replace(report, reason=f"{report.reason} ({_last_line(ended.errors, 'error')})")
    return report


def _memory_shortage(errors: str, job: TestJob, *, roomy: bool) -> TestReport | None:
    """Return the report on a lack of memory or a failing device, if *errors* tell of one; it says whether the model is at fault."""
    if fault := _line_with(errors, _DEVICE_FAULT):
        return _report("unable", f"the device could not take it now: {fault}", job)
    shortage = _line_with(errors, _NO_MEMORY)
    if not shortage:
        return None
    if roomy:
        return _report("bad", f"it takes more memory than a file of its size may: {shortage}", job)
    return _report("unable", f"the device could not take it now: {shortage}", job)


def _line_with(errors: str, words: tuple[str, ...]) -> str:
    """Return the last line of *errors* with the first of *words* that is in it, or an empty text."""
    return next((_last_line(errors, word) for word in words if word in errors.lower()), "")


def _with_circumstances(report: TestReport, ended: ProcessResult, seconds: float, gpus: tuple[Gpu, ...]) -> TestReport:
    """Add to the report of a job that did not pass what the engine wrote and, where the child did not say, the device and the time."""
    if report.verdict == "passed":
        return report
    layers = report.gpu_layers or max((int(found) for found in _OFFLOADED.findall(ended.errors)), default=0)
    began = report.load_seconds or result.LOADING in ended.errors
    return msgspec.structs.replace(
        report,
        stderr=blame.kept(ended.errors),
        run_seconds=report.run_seconds or (0.0 if report.load_seconds else seconds),
        gpu_layers=layers,
        device=report.device or (gpus[0].device if layers and gpus else "cpu" if began else ""),
    )


def _with_files(report: TestReport, job: TestJob) -> TestReport:
    """Add which files of the tree were not loaded. A child names only files; a server's loads the entrypoint."""
    tree = job.tree.resolve()
    there = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    loaded = set(report.exercised) or ({job.entrypoint} if report.verdict == "passed" else set())
    return msgspec.structs.replace(report, exercised=tuple(sorted(loaded & there)), not_exercised=tuple(sorted(there - loaded)))


def _report(verdict: Verdict, reason: str, job: TestJob) -> TestReport:
    return TestReport(verdict=verdict, reason=printable(reason), engine=job.runtime.engine)


def _last_line(errors: str, word: str = "") -> str:
    """Return the last line that is not empty, or the last one with *word* in it if there is any."""
    lines = [line.strip() for line in errors.splitlines() if line.strip(" .\t")]
    chosen = [line for line in lines if word in line.lower()] or lines
    return printable(chosen[-1])[:300] if chosen else "it said nothing"


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()
