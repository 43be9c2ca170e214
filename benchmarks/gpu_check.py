"""
Shows, on a machine with an NVIDIA GPU, that test jobs run on the GPU inside the sandbox, and what they take of it: ``make gpu-check``.

    make gpu-check BUNDLE=build/gpu/reconcile-gpu-sm_90.tar.xz       on a machine without a registry; see benchmarks/gpu_bundle.py
    python -m benchmarks.gpu_check --out FOLDER                      with an installed llama-cpp-python that was built with CUDA

Rules that hold here:

1. It ends within three minutes: a check that would begin later is said to be left out, and counts as fallen.
2. It goes through every check, whatever falls, but for the first: without a GPU there is nothing to see. It ends with 1 if any fell.
3. What it says is in FOLDER, as ``gpu-check.json`` and ``gpu-check.txt``.
4. Where the kernel has no sandbox, what it lacks is named, and the GPU's own figures are taken without one, and said to be.
5. Each claim has an opposite that must fall: the same job with the devices hidden is not a pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from msgspec import Struct, structs

from reconciler.core import fit, gguf
from reconciler.core.node import Gpu
from reconciler.core.snapshot import Smoke
from reconciler.demo.server import serving
from reconciler.ports import TestJob, TestReport
from reconciler.runtime import device_nodes, devices, driver_libraries, engines, gpu_use, smoke_test
from reconciler.sandbox import choose
from reconciler.sandbox.process import Mode
from reconciler.settings import Runtimes
from tests import gguf_shapes, jobs
from tests.gguf_shapes import Shape
from tests.node import Node

MIB = 1 << 20
SECONDS = 180.0
#: 750 MB and 60 MB of weights in half precision, with a vocabulary of bytes.
LARGE = Shape(width=2048, layers=8, heads=16, heads_kv=8, feed_forward=5632, vocabulary=259, context=4096)
SMALL = Shape(width=768, layers=6, heads=12, heads_kv=12, feed_forward=2048, vocabulary=259, context=4096)
TOKENS = 128
#: What a driver may keep of a process that ended, or another process take meanwhile.
_SLACK = 64 * MIB
_SAMPLE_SECONDS = 0.01
_MOST_RATIO = 1.1
_MOST_OFF = 0.10
_LEAK_JOBS = 20
#: The memory of the last job must be free within so many seconds.
_SETTLING_SECONDS = 5.0


class Fell(Exception):
    """A check did not show what it is for; the message says what was seen."""


class Result(Struct, frozen=True, kw_only=True):
    """How one check ended."""

    name: str
    passed: bool
    said: str
    figures: dict[str, Any] = {}
    seconds: float = 0.0


class Seen(Struct, kw_only=True):
    """What the driver saw while something ran; bytes."""

    before: int
    most: int
    after: int = 0
    processes: set[int] = set()


class Given:
    """What all checks share: a folder, two models, the GPUs and the sandboxes that work here."""

    def __init__(self, folder: Path, large: Shape = LARGE) -> None:
        self.folder = folder
        self.shape = large
        self.gpus = devices.gpus()
        self.modes: list[Mode] = [found.mode for found in choose.probe_all() if found.works]
        self.lacking = [f"{found.mode}: {found.detail}" for found in choose.probe_all() if not found.works]
        self.large = gguf_shapes.write(large, folder / "large.gguf", seed=1)
        self.small = gguf_shapes.write(SMALL, folder / "small.gguf", seed=2)

    def tree(self, model: Path) -> Path:
        """Return a folder with *model* alone."""
        tree = self.folder / f"tree-{model.stem}"
        tree.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(model, tree / "model.gguf")
        return tree

    def job(self, model: Path, *, tokens: int = 4, gpu_memory: int = MIB, record: bool = False, **smoke: Any) -> TestJob:
        """Return a test job on *model*."""
        wanted = msgspec.convert({"prompt": "Hello", "max_tokens": tokens, "timeout": "60s", "expect": {}} | smoke, Smoke)
        job = jobs.folder_job(self.tree(model), engine="llama-cpp", entrypoint="model.gguf")
        return structs.replace(job, smoke=wanted, gpu_memory=gpu_memory, record=record)

    def test(self, job: TestJob, settings: str = "", mode: str = "") -> TestReport:
        """Run *job* in the sandbox *mode*, else in the first that works."""
        if not self.modes:
            raise Fell(f"no sandbox works here: {'; '.join(self.lacking)}")
        text = f'[smoke]\nsandbox = "{mode or self.modes[0]}"\n{settings}'
        return jobs.make_tester(self.folder, text).test(job)

    def passed(self, job: TestJob, settings: str = "", mode: str = "") -> TestReport:
        """Run *job*, which must pass on the GPU."""
        report = self.test(job, settings, mode)
        if report.verdict != "passed" or not report.gpu_layers:
            raise Fell(f"the test job is {report.verdict}, with {report.gpu_layers} layers on the GPU: {report.reason}")
        return report


Figures = dict[str, Any]
Check = Callable[[Given, Figures], str]


# -- what there is -------------------------------------------------------------------------------------


def sandboxes(given: Given, figures: Figures) -> str:
    """Name the sandboxes that work, and what of others this kernel lacks."""
    figures |= {"works": given.modes, "lacking": given.lacking, "kernel": platform.release()}
    if not given.modes:
        raise Fell(f"none works on kernel {platform.release()}: {'; '.join(given.lacking)}; figures of the GPU are taken without a sandbox")
    return f"{', '.join(given.modes)} work on kernel {platform.release()}" + (f"; {'; '.join(given.lacking)}" if given.lacking else "")


def nodes(given: Given, figures: Figures) -> str:
    """Name the device files that a test job is given, and what is missing."""
    found = devices.job_devices(given.gpus)
    places = driver_libraries.folders()
    figures |= {"given": [str(path) for path in found.given], "lacking": list(found.lacking), "libraries": [str(path) for path in places]}
    if found.lacking:
        raise Fell("; ".join(found.lacking))
    return f"{len(found.given)} device files; libraries in {', '.join(map(str, places)) or 'the loader s own places'}"


def ggml_sees(given: Given, figures: Figures) -> str:
    """Ask ggml which devices it has, in a process of its own, without a sandbox."""
    code = (
        "import json, llama_cpp; print(json.dumps([llama_cpp.__version__, bool(llama_cpp.llama_supports_gpu_offload()),"
        " llama_cpp.llama_print_system_info().decode()]))"
    )
    use = gpu_use.of_job(given.gpus, Runtimes(), "llama-cpp", server=False)
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | use.variables, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise Fell(f"llama-cpp-python does not start: {ran.stderr.strip().splitlines()[-1:]}")
    version, offload, features = json.loads(ran.stdout.splitlines()[-1])
    figures |= {"version": version, "features": features}
    if not offload:
        raise Fell(f"llama-cpp-python {version} finds no GPU; it is built with: {features}")
    return f"llama-cpp-python {version}: {features}"


def instances(given: Given, figures: Figures) -> str:
    """List every GPU and MIG slice as NVML and this node have them."""
    figures["gpus"] = [msgspec.to_builtins(gpu) for gpu in given.gpus]
    if not given.gpus:
        raise Fell("NVML names none")
    slices = sum(gpu.uuid.startswith("MIG-") for gpu in given.gpus)
    return f"{len(given.gpus)}, of which {slices} MIG slices: {', '.join(gpu.device for gpu in given.gpus)}"


# -- on the GPU ----------------------------------------------------------------------------------------


def on_gpu(given: Given, figures: Figures) -> str:
    """Run a test job in each sandbox; hold the engine's word to what the driver saw."""
    if not given.modes:
        raise Fell(f"no sandbox works here: {'; '.join(given.lacking)}")
    for mode in given.modes:
        with watched() as seen:
            report = given.passed(given.job(given.large, tokens=16), mode=mode)
        figures[mode] = {
            "layers": report.gpu_layers,
            "told": report.gpu_memory_used,
            "more": seen.most - seen.before,
            "device": report.device,
        }
        figures[mode]["processes"] = sorted(seen.processes)
        size = given.large.stat().st_size
        if report.gpu_layers != given.shape.layers + 1:
            raise Fell(f"{report.gpu_layers} of {given.shape.layers + 1} layers ran on the GPU in {mode}")
        if seen.most - seen.before < size // 2:
            raise Fell(f"the driver saw only {_mib(seen.most - seen.before)} more in use in {mode}, for a model of {_mib(size)}")
    listed = any(figures[mode]["processes"] for mode in given.modes)
    return f"all layers in {', '.join(given.modes)}; NVML {'listed the process' if listed else 'lists no processes here'}"


def without_a_sandbox(given: Given, figures: Figures) -> str:
    """Run the engine's child as it is: the GPU's own figures, also where no sandbox works."""
    use = gpu_use.of_job(given.gpus, Runtimes(), "llama-cpp", server=False)
    answer = _bare(given, given.large, use.variables)
    figures |= {key: answer.get(key) for key in ("load_seconds", "tokens_per_second", "gpu_layers", "gpu_memory_used", "reason")}
    if not answer.get("gpu_layers"):
        raise Fell(f"no layer on the GPU: {answer.get('reason', '')}")
    return f"{answer['gpu_layers']} layers, {answer['tokens_per_second']:.0f} tokens/s, without a sandbox"


def hidden(given: Given, figures: Figures) -> str:
    """Hide the devices from the job that passes: neither the variable nor missing files let it pass on the CPU."""
    with mock.patch.dict(os.environ, {devices.VISIBLE: ""}):
        report = given.test(given.job(given.small))
    figures["chosen none"] = f"{report.verdict}: {report.reason}"
    if report.verdict != "unable":
        raise Fell(f"with no GPU chosen it is {report.verdict}")
    real = gpu_use.of_job

    def blind(*arguments: Any, **options: Any) -> gpu_use.GpuUse:
        use = real(*arguments, **options)
        return structs.replace(use, variables=use.variables | {devices.VISIBLE: ""})

    with mock.patch.object(gpu_use, "of_job", blind):
        report = given.test(given.job(given.small))
    figures["hidden from CUDA"] = f"{report.verdict}: {report.reason}"
    if report.verdict != "unable" or gpu_use.UNUSED not in report.reason:
        raise Fell(f"with CUDA_VISIBLE_DEVICES empty in the sandbox it is {report.verdict}: {report.reason}")
    return report.reason


def driver_gone(given: Given, figures: Figures) -> str:
    """Take the device files away: the model stays pending."""
    none = device_nodes.DeviceNodes(lacking=("/dev/nvidiactl is missing",))
    with mock.patch.object(device_nodes, "find", return_value=none):
        report = given.test(given.job(given.small))
    figures["said"] = f"{report.verdict}: {report.reason}"
    if report.verdict != "unable" or gpu_use.UNUSED not in report.reason:
        raise Fell(figures["said"])
    return report.reason


def cpu_on_purpose(given: Given, figures: Figures) -> str:
    """Serve on the CPU on purpose: gpu_layers = 0 passes there, and no memory of the GPU is taken."""
    with watched() as seen:
        report = given.test(given.job(given.small), "[runtime.llama-cpp]\ngpu_layers = 0\n")
    figures |= {"verdict": report.verdict, "device": report.device, "more": seen.most - seen.before, "rate": report.tokens_per_second}
    if (report.verdict, report.device) != ("passed", "cpu"):
        raise Fell(f"{report.verdict} on {report.device}: {report.reason}")
    return f"passed on the CPU, {report.tokens_per_second:.0f} tokens/s"


def known_answer(given: Given, figures: Figures) -> str:
    """Record an answer on the CPU and hold the GPU to it; one with another token must fall."""
    recorded = given.test(given.job(given.small, tokens=32, record=True, gpu_memory=0), "[runtime.llama-cpp]\ngpu_layers = 0\n")
    answer = msgspec.to_builtins(recorded.answer) if recorded.verdict == "passed" else None
    if not answer:
        raise Fell(f"nothing was recorded on the CPU: {recorded.reason}")
    given.passed(given.job(given.small, tokens=32, expect={"answer": answer}))
    sure = answer.get("sure") or []
    figures |= {"tokens": len(answer["tokens"]), "compared": len(sure)}
    if not sure:
        raise Fell("no token of it is compared: there is no wide lead anywhere")
    wrong = list(answer["tokens"])
    wrong[sure[0]] = (wrong[sure[0]] + 1) % 256 + 3
    report = given.test(given.job(given.small, tokens=32, expect={"answer": answer | {"tokens": wrong}}))
    if report.verdict != "bad":
        raise Fell(f"another answer is {report.verdict}: {report.reason}")
    return f"{len(answer['tokens'])} tokens recorded on the CPU hold on the GPU, {len(sure)} of them compared; another token falls"


def memory(given: Given, figures: Figures) -> str:
    """Compare the GPU's memory at its peak with the estimate from the header."""
    with watched() as seen:
        report = given.passed(given.job(given.large, tokens=TOKENS))
    shape = gguf.check(given.large).shape
    need = fit.estimate(shape, fit.Job(context=512))
    peak = seen.most - seen.before
    own = fit.OVERHEADS[-1].gpu_bytes
    figures |= {
        "estimated": need.gpu_bytes,
        "peak": peak,
        "told": report.gpu_memory_used,
        "estimated without overhead": need.gpu_bytes - own,
    }
    figures["overhead measured"] = peak - report.gpu_memory_used
    off = need.gpu_bytes / peak - 1 if peak else 1.0
    said = f"estimated {_mib(need.gpu_bytes)}, at most {_mib(peak)} ({100 * off:+.1f} %)"
    said += f"; beside its buffers {_mib(peak - report.gpu_memory_used)}"
    if abs(off) > _MOST_OFF:
        raise Fell(said)
    return said


def rate(given: Given, figures: Figures) -> str:
    """Compare the rate, and the time from the start of loading to the first token, with llama.cpp's own bench of the same file."""
    reports = [given.passed(given.job(given.large, tokens=TOKENS)) for _ in range(3)]
    one = given.passed(given.job(given.large, tokens=1))
    ours, first = statistics.median(report.tokens_per_second for report in reports), one.load_seconds + one.run_seconds
    _, started = _bench(given, 1)
    theirs, _ = _bench(given, TOKENS)
    figures |= {"ours": ours, "llama-bench": theirs, "first token": first, "llama-bench to its first token, with its start": started}
    said = f"{ours:.0f} tokens/s, llama-bench {theirs:.0f}: {theirs / ours:.2f} x; "
    said += f"first token after {first:.2f} s, llama-bench {started:.2f} s"
    if theirs > _MOST_RATIO * ours or first > _MOST_RATIO * started:
        raise Fell(said)
    return said


def _bench(given: Given, tokens: int) -> tuple[float, float]:
    """Run llama.cpp's own bench on the large model; return its tokens a second, and how many seconds the whole program took."""
    use = gpu_use.of_job(given.gpus, Runtimes(), "llama-cpp", server=False)
    places = [str(Path(engines_folder(), "lib")), use.variables.get("LD_LIBRARY_PATH", "")]
    command = [os.environ.get("GPU_BENCH", "llama-bench"), "-m", str(given.large), "-n", str(tokens), "-p", "0", "-ngl", "99", "-o", "json"]
    command += ["-r", "3"] if tokens > 1 else ["-r", "1", "--no-warmup"]
    variables = os.environ | use.variables | {"LD_LIBRARY_PATH": ":".join(filter(None, places))}
    began = time.monotonic()
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=90)
    if done.returncode:
        raise Fell(f"llama-bench ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return float(json.loads(done.stdout)[0]["avg_ts"]), time.monotonic() - began


# -- when memory is short ------------------------------------------------------------------------------


def one_after_the_other(given: Given, figures: Figures) -> str:
    """Apply two models whose sum does not fit beside a ballast: both become active."""
    need = fit.estimate(gguf.check(given.large).shape, fit.Job(context=512)).gpu_bytes
    with serving() as server, ballast(given, leave=need + need // 2) as left:
        figures |= {"free": left, "each needs": need}
        node = Node(given.folder / "node", server)
        node.configure(f'[smoke]\nsandbox = "{given.modes[0] if given.modes else "auto"}"\n')
        data = given.large.read_bytes()
        other = data[:-4096] + bytes(4096)
        smoke = {"prompt": "Hello", "max_tokens": 4, "timeout": "60s"}
        node.publish(*(node.item(name, bytes_, gpu_memory=need, smoke=smoke) for name, bytes_ in (("a:v1", data), ("b:v1", other))))
        ran = node.run("apply")
        states = node.states()
        figures["states"] = states
    if ran.code or states != {"a:v1": "active", "b:v1": "active"}:
        raise Fell(f"{states}: {ran.out[-300:]}{ran.err[-300:]}")
    return f"both are active, each needs {_mib(need)} of {_mib(left)} free"


def taken_by_others(given: Given, figures: Figures) -> str:
    """Let another process take the memory: the model is pending, whether it is seen before or the engine runs into it."""
    with ballast(given, leave=256 * MIB) as left:
        figures["free"] = left
        report = given.test(given.job(given.large, gpu_memory=800 * MIB))
        figures["seen before"] = f"{report.verdict}: {report.reason}"
        if report.verdict != "unable":
            raise Fell(f"{report.verdict}: {report.reason}")
        roomy = tuple(structs.replace(gpu, free_bytes=gpu.total_bytes) for gpu in given.gpus)
        with mock.patch.object(devices, "gpus", return_value=roomy):
            report = given.test(given.job(given.large))
        figures["run into"] = f"{report.verdict}: {report.reason}"
        if report.verdict != "unable":
            raise Fell(f"{report.verdict}: {report.reason}")
    return report.reason


def leaks(given: Given, figures: Figures) -> str:
    """Run twenty test jobs: the GPU's memory returns to where it was."""
    before = used()
    for _ in range(_LEAK_JOBS):
        given.passed(given.job(given.small))
    end = time.monotonic() + _SETTLING_SECONDS
    while (after := used()) - before > _SLACK and time.monotonic() < end:
        time.sleep(0.1)  # the driver takes memory back some time after a process ended, and tells nobody
    figures |= {"jobs": _LEAK_JOBS, "before": before, "after": after}
    if after - before > _SLACK:
        raise Fell(f"{_mib(after - before)} did not come back after {_LEAK_JOBS} jobs")
    return f"{_mib(before)} before, {_mib(after)} after {_LEAK_JOBS} jobs"


def second_engine(given: Given, figures: Figures) -> str:
    """Test a model with transformers' server, in the sandbox, on the GPU."""
    program = Path(sys.executable).with_name("transformers")
    if not program.exists():
        raise Fell(f"transformers is not installed beside this Python: {program} is not there")
    folder = given.folder / "hub"
    made = subprocess.run([sys.executable, "-m", "tests.children.make_hub_model", folder], capture_output=True, text=True, check=False)
    if made.returncode:
        raise Fell(f"no model could be made: {made.stderr.strip()[-300:]}")
    argv = [str(program), "serve", "{folder}", "--host", "127.0.0.1", "--port", "{port}", "--device", "cuda"]
    table = f'[runtime.transformers]\nargv = {json.dumps(argv)}\nversion = "5.0"\nready_timeout = "60s"\n'
    job = structs.replace(jobs.folder_job(folder, engine="transformers", timeout="60s"), gpu_memory=MIB)
    report = given.test(job, table)
    figures |= {"verdict": report.verdict, "device": report.device, "reason": report.reason, "rate": report.tokens_per_second}
    if report.verdict != "passed" or not report.device.startswith("cuda"):
        raise Fell(f"{report.verdict} on {report.device or 'nothing'}: {report.reason}")
    return f"passed on {report.device}"


CHECKS: tuple[Check, ...] = (
    sandboxes, instances, nodes, ggml_sees, on_gpu, without_a_sandbox, hidden, driver_gone, cpu_on_purpose, memory, rate, known_answer,
    taken_by_others, one_after_the_other, leaks, second_engine,
)  # fmt: skip


# -- the machinery -------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description="Show that test jobs run on the GPU inside the sandbox.")
    parser.add_argument("--out", type=Path, default=Path("gpu-check-results"), help="the folder for what it says")
    parser.add_argument("--go-on", action="store_true", help="go on without a GPU, to rehearse: what needs one falls")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long it may take in all")
    parser.add_argument("--only", action="append", default=[], choices=[check.__name__ for check in CHECKS], help="this check alone")
    chosen = parser.parse_args(arguments)
    if not devices.gpus() and not chosen.go_on:
        print("gpu-check: no NVIDIA GPU answers on this machine (no driver, or no device): nothing was shown")
        return 1
    chosen.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        Path(folder).chmod(0o755)
        given = Given(Path(folder), LARGE if devices.gpus() else SMALL)  # a rehearsal on a CPU must end too
        checks = [check for check in CHECKS if not chosen.only or check.__name__ in chosen.only]
        results = [ran(check, given, began + chosen.seconds) for check in checks]
    write(chosen.out, given.gpus, results, time.monotonic() - began)
    return int(not all(result.passed for result in results))


def ran(check: Check, given: Given, until: float) -> Result:
    """Run one check; whatever it raises is how it fell."""
    name, figures, began = check.__name__.replace("_", " "), Figures(), time.monotonic()
    if began > until:
        result = Result(name=name, passed=False, said="left out: the time was over")
    else:
        try:
            result = Result(name=name, passed=True, said=check(given, figures))
        except Fell as fell:
            result = Result(name=name, passed=False, said=str(fell))
        except Exception as error:  # noqa: BLE001  the others must run
            result = Result(name=name, passed=False, said=f"{type(error).__name__}: {error}"[:500])
    result = structs.replace(result, figures=figures, seconds=round(time.monotonic() - began, 2))
    print(line_of(result), flush=True)
    return result


def line_of(result: Result) -> str:
    return f"{'passed' if result.passed else 'FELL  '}  {result.name} ({result.seconds:.1f} s): {result.said}"


def write(out: Path, gpus: tuple[Gpu, ...], results: list[Result], seconds: float) -> None:
    """Write what was found, for programs and for people."""
    machine = {"kernel": platform.release(), "python": platform.python_version(), "gpus": [msgspec.to_builtins(gpu) for gpu in gpus]}
    document = {"machine": machine, "seconds": round(seconds, 1), "checks": [msgspec.to_builtins(result) for result in results]}
    (out / "gpu-check.json").write_text(json.dumps(document, indent=2, default=str) + "\n")
    head = f"{', '.join(gpu.device for gpu in gpus) or 'no GPU'}, driver {gpus[0].driver if gpus else '-'}, kernel {platform.release()}"
    fallen = sum(not result.passed for result in results)
    lines = [head, *map(line_of, results), f"{len(results) - fallen} passed, {fallen} fell, in {seconds:.0f} s"]
    (out / "gpu-check.txt").write_text("\n".join(lines) + "\n")
    print(lines[-1])


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """Note what the driver sees, before and as long as this is entered."""
    seen, stop = Seen(before=used(), most=0, processes=set()), threading.Event()
    known = processes()

    def watch() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            seen.most = max(seen.most, used())
            seen.processes |= processes() - known

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        stop.set()
        watching.join()
        seen.after = used()


def used() -> int:
    """Return the bytes in use on all GPUs."""
    return sum(gpu.total_bytes - gpu.free_bytes for gpu in devices.gpus())


def processes() -> set[int]:
    """Return the ids of the processes that compute on a GPU, as NVML lists them: those of the machine, whatever namespace we are in."""
    if not devices.gpus():
        return set()
    import pynvml

    found: set[int] = set()
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            found |= {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        pynvml.nvmlShutdown()
    return found


_BALLAST = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
free, total, place = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
if library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)): sys.exit("no device")
if library.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(max(free.value - int(sys.argv[2]), 0))): sys.exit("no memory")
print("taken", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def ballast(given: Given, *, leave: int) -> Iterator[int]:
    """Take the first GPU's memory in another process, all but *leave* bytes; yield what is free then."""
    places = driver_libraries.folders()
    runtime = next((found for name in ("libcudart.so.13", "libcudart.so.12") if (found := driver_libraries.find(name, places))), None)
    use = gpu_use.of_job(given.gpus, Runtimes(), "llama-cpp", server=False)
    command = [sys.executable, "-c", _BALLAST, str(runtime or "libcudart.so"), str(leave)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=os.environ | use.variables) as taking:
        assert taking.stdin
        assert taking.stdout
        assert taking.stderr
        if taking.stdout.readline().strip() != "taken":
            raise Fell(f"no memory could be taken: {taking.stderr.read().strip()[-300:]}")
        try:
            yield max((gpu.free_bytes for gpu in devices.gpus()), default=0)
        finally:
            taking.stdin.close()


def _bare(given: Given, model: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Run the child that tests a model, without a sandbox, on a model that we made ourselves; return its verdict."""
    job = given.job(model, tokens=TOKENS)
    document = {"nonce": "n"} | smoke_test.job_document(job, {"gpu_layers": -1, "threads": 0}, seconds=60)
    command = [sys.executable, "-m", "reconciler.runtime.llama_cpp_worker"]
    done = subprocess.run(
        command, input=json.dumps(document), capture_output=True, text=True, check=False, timeout=90, env=os.environ | variables
    )
    found = re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)
    if not found:
        raise Fell(f"the child gave no verdict: {done.stderr.strip()[-300:]}")
    answer: dict[str, Any] = json.loads(found[-1])
    return answer


def engines_folder() -> Path:
    """Return the folder of the installed engine."""
    place = next((Path(place, "llama_cpp") for place in sys.path if Path(place, "llama_cpp").is_dir()), None)
    if place is None or engines.package_version("llama-cpp-python") is None:
        raise Fell("llama-cpp-python is not installed")
    return place


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
