"""GPUs as facts: quick and silent where there is none, and no device is given to a test job that needs none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from reconciler.core import lifecycle, lock, trust
from reconciler.core.lock import LockedModel
from reconciler.core.node import Gpu, NodeFacts
from reconciler.ports import TestReport
from reconciler.runtime import devices, driver_libraries, gpu_use
from reconciler.runtime.device_nodes import DeviceNodes
from reconciler.settings import LlamaCppSettings, Runtimes
from tests import jobs
from tests.network import Network

BIG = Gpu(name="NVIDIA H200", total_bytes=150 << 30, free_bytes=140 << 30, driver="560.35")
SMALL = Gpu(name="NVIDIA L4", total_bytes=24 << 30, free_bytes=23 << 30, driver="560.35")


@pytest.mark.parametrize("drivers", [(), ("/",)], ids=["no driver", "no library of it"])
def test_without_a_driver_there_is_no_gpu_and_its_binding_is_not_loaded(drivers: tuple[str, ...]) -> None:
    code = (
        "import ctypes, json, sys; from reconciler.runtime import devices; ctypes.CDLL = lambda name: (_ for _ in ()).throw(OSError(name));"
        f"devices._DRIVERS = {drivers!r};"
        "print(json.dumps([devices.gpus(), devices.device_label(devices.gpus()), 'pynvml' in sys.modules]))"
    )
    top = Path(__file__).resolve().parents[2]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=top)
    assert json.loads(ran.stdout) == [[], "cpu", False]
    assert ran.stderr == ""


def test_a_label_changes_with_the_gpus_and_their_driver_and_with_nothing_else() -> None:
    assert devices.device_label(()) == "cpu"
    label = devices.device_label((BIG, SMALL))
    assert label == devices.device_label((SMALL, BIG)) == "2 x NVIDIA H200, NVIDIA L4, driver 560.35"
    busy = Gpu(name=BIG.name, total_bytes=BIG.total_bytes, free_bytes=0, driver=BIG.driver)
    assert devices.device_label((busy, SMALL)) == label
    updated = Gpu(name=BIG.name, total_bytes=BIG.total_bytes, free_bytes=BIG.free_bytes, driver="570.01")
    assert devices.device_label((updated,)) != devices.device_label((BIG,))
    assert devices.device_label((BIG, BIG)) != devices.device_label((BIG,))


def test_without_a_gpu_no_nvidia_device_is_given() -> None:
    assert not any(path.name.startswith("nvidia") for path in devices.job_devices(()).given)


def test_a_display_is_no_reason_to_give_its_device() -> None:
    assert Path("/dev/kfd").exists() or Path("/dev/dri") not in devices.job_devices((BIG,)).given


# -- the operator's choice -----------------------------------------------------------------------------

TWO = (
    Gpu(name="A", total_bytes=10, free_bytes=3, index=0, uuid="GPU-1111-aaaa"),
    Gpu(name="B", total_bytes=10, free_bytes=7, index=1, uuid="GPU-2222-bbbb"),
)
SLICES = (
    Gpu(name="M", total_bytes=10, free_bytes=9, index=0, uuid="MIG-1111"),
    Gpu(name="M", total_bytes=10, free_bytes=9, index=1, uuid="MIG-2222"),
)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (None, [0, 1]), ("0", [0]), ("1,0", [1, 0]), ("1", [1]), ("", []), ("-1", []), ("0,7,1", [0]), ("0,0", [0]),
        ("GPU-2222", [1]), ("GPU-2222-bbbb, GPU-1111", [1, 0]), ("GPU-", []), ("NoDevFiles", []),
    ],
)  # fmt: skip
def test_the_variable_of_cuda_chooses_as_it_does_for_the_programs_that_serve(text: str | None, seen: list[int]) -> None:
    variables = {} if text is None else {devices.VISIBLE: text}
    assert [gpu.index for gpu in devices.visible(TWO, (), variables)] == seen


def test_the_settings_choose_before_the_variable() -> None:
    assert devices.visible(TWO, ("1",), {devices.VISIBLE: "0"}) == TWO[1:]
    assert devices.visible(SLICES, ("MIG-2222",), {}) == SLICES[1:]


def test_a_test_job_sees_the_one_gpu_with_the_most_room_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "job_devices", lambda found: DeviceNodes(given=(Path("/dev/null"),) if found else ()))
    use = gpu_use.of_job(TWO, Runtimes(), "llama-cpp", server=False)
    assert use.gpus == TWO[1:]
    assert use.variables[devices.VISIBLE] == "GPU-2222-bbbb"
    split = gpu_use.of_job(TWO, Runtimes(llama_cpp=LlamaCppSettings(split=True)), "llama-cpp", server=False)
    assert split.variables[devices.VISIBLE] == "GPU-1111-aaaa,GPU-2222-bbbb"
    chosen = gpu_use.of_job(TWO[:1], Runtimes(llama_cpp=LlamaCppSettings(devices=("0",))), "vllm", server=True)
    assert chosen.variables[devices.VISIBLE] == "GPU-1111-aaaa"


def test_where_models_are_served_on_the_cpu_on_purpose_no_device_is_given() -> None:
    use = gpu_use.of_job(TWO, Runtimes(llama_cpp=LlamaCppSettings(gpu_layers=0)), "llama-cpp", server=False)
    assert (use.on_cpu, use.gpus, use.devices) == (True, (), ())
    assert not {"CUDA_VISIBLE_DEVICES", "CUDA_CACHE_PATH"} & use.variables.keys()


# -- libraries -----------------------------------------------------------------------------------------


def test_libraries_are_found_where_containers_and_packages_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mount/libcuda.so.1", "site/nvidia/cu13/lib/libcublas.so.13", "inherited/libnvidia-ml.so.1", "other/libz.so.1"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    variables = {"LD_LIBRARY_PATH": f"{tmp_path}/other:{tmp_path}/inherited:{tmp_path}/gone:relative"}
    found = driver_libraries.folders(("/named/by/settings",), variables=variables, usual=(f"{tmp_path}/mount", f"{tmp_path}/nowhere"))
    places = ["/named/by/settings", *(f"{tmp_path}/{name}" for name in ("inherited", "mount", "site/nvidia/cu13/lib"))]
    assert [str(folder) for folder in found] == places


def test_libraries_outside_of_the_system_are_given_to_read_and_named_to_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "job_devices", lambda _: DeviceNodes(given=(Path("/dev/null"),)))
    runtimes = Runtimes(llama_cpp=LlamaCppSettings(library_path=(str(tmp_path), "/usr/lib"), cuda_cache=str(tmp_path / "cache")))
    use = gpu_use.of_job(TWO, runtimes, "llama-cpp", server=False)
    assert tmp_path in use.read
    assert not any(path.is_relative_to("/usr") for path in use.read)
    assert use.variables["LD_LIBRARY_PATH"].startswith(f"{tmp_path}:/usr/lib")
    assert use.variables["CUDA_CACHE_PATH"] == str(tmp_path / "cache")


@pytest.mark.parametrize("found", [(), TWO])
@pytest.mark.parametrize("layers", [0, -1])
def test_an_engine_that_was_built_with_cuda_finds_its_libraries_on_the_cpu_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: tuple[Gpu, ...], layers: int
) -> None:
    monkeypatch.setattr(devices, "job_devices", lambda _: DeviceNodes())
    runtimes = Runtimes(llama_cpp=LlamaCppSettings(library_path=(str(tmp_path),), gpu_layers=layers))
    use = gpu_use.of_job(found, runtimes, "llama-cpp", server=False)
    assert tmp_path in use.read
    assert use.variables["LD_LIBRARY_PATH"].startswith(str(tmp_path))


# -- why a GPU was not used ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "errors", "offload", "word"),
    [
        (gpu_use.GpuUse(gpus=TWO), "", False, "llama-cpp-python is built without CUDA"),
        (gpu_use.GpuUse(gpus=TWO, lacking=("/dev/nvidia-uvm is missing",)), "", True, "/dev/nvidia-uvm is missing"),
        (gpu_use.GpuUse(gpus=TWO), "x\nggml_cuda_init: failed to initialize CUDA: no device is detected\ny", True, "ggml_cuda_init"),
        (gpu_use.GpuUse(gpus=TWO), "nothing of it", True, "the engine put no layer on it"),
    ],
)  # fmt: skip
def test_the_reason_names_what_keeps_the_gpu_from_being_used(
    use: gpu_use.GpuUse, errors: str, offload: bool, word: str, tmp_path: Path
) -> None:
    passed = TestReport(verdict="passed")
    found = gpu_use.judged(passed, jobs.job(tmp_path, b""), use, on_gpu=False, server=False, errors=errors, offload=offload)
    assert found.verdict == "unable"
    assert found.reason.startswith(f"the GPU was not used: {word}")


# -- several GPUs --------------------------------------------------------------------------------------


def test_a_model_that_fits_only_when_split_is_incompatible_unless_the_node_permits_it() -> None:
    model = lock_of(gpu_memory=16 << 30)
    gpus = tuple(Gpu(name="L4", total_bytes=12 << 30, free_bytes=0) for _ in range(2))
    node = NodeFacts(gpus=gpus, engines={"llama-cpp": "0.3.36"})
    why = lifecycle.incompatible(model, node)
    assert why == (
        "needs 16.0 GiB of GPU memory, the largest GPU has 12.0 GiB; "
        "it fits on 2 together, if the settings say [runtime.llama-cpp] split = true"
    )
    assert lifecycle.incompatible(model, structs.replace(node, split=True)) == ""
    too_large = lock_of(gpu_memory=30 << 30)
    assert "split" not in lifecycle.incompatible(too_large, node)
    assert lifecycle.incompatible(too_large, structs.replace(node, split=True)) == (
        "needs 30.0 GiB of GPU memory, the 2 GPUs together have 24.0 GiB"
    )


def lock_of(*, gpu_memory: int) -> LockedModel:
    network = Network()
    found = trust.verify(
        network.snapshot(network.model("a:v1", b"x", gpu_memory=gpu_memory)),
        network.trusted(),
        now=network.now,
        trust_state=trust.TrustState(),
    )
    return lock.compile_model(found.snapshot.models[0])
