"""The programs for machines with a GPU, as far as they go on one without: each ends where it must, with one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_backend, gpu_bundle, gpu_check
from benchmarks.gpu_check import Fell, Figures, Given, Result
from reconciler.runtime import devices
from tests import gguf_shapes
from tests.gguf_shapes import Shape

TOP = Path(__file__).resolve().parents[2]
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia")


@pytest.fixture
def _no_gpu() -> None:
    if any(Path(place).exists() for place in DRIVERS):
        pytest.skip("this machine has a driver of a GPU")


@pytest.mark.usefixtures("_no_gpu")
def test_without_a_gpu_the_check_ends_at_its_first_step_with_one_sentence(tmp_path: Path) -> None:
    ran = subprocess.run(
        ["sh", TOP / "benchmarks/gpu_check.sh", "nothing.tar.xz"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert ran.returncode == 1
    assert ran.stdout == f"gpu-check: this machine has no NVIDIA GPU: none of {DRIVERS[0]}, {DRIVERS[1]} and {DRIVERS[2]} is there\n"
    assert ran.stderr == ""
    assert list(tmp_path.iterdir()) == []
    ran = subprocess.run([sys.executable, "-m", "benchmarks.gpu_check"], capture_output=True, text=True, check=False, cwd=TOP)
    assert (ran.returncode, ran.stdout.count("\n")) == (1, 1)


def test_the_check_goes_on_whatever_falls_and_writes_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def falls(_: Given, figures: Figures) -> str:
        figures["seen"] = 1
        raise Fell("it did not hold")

    def breaks(_: Given, __: Figures) -> str:
        raise ZeroDivisionError("a mistake of ours")

    def holds(_: Given, __: Figures) -> str:
        return "it held"

    given = Given.__new__(Given)
    results = [gpu_check.ran(check, given, float("inf")) for check in (falls, breaks, holds)]
    results.append(gpu_check.ran(holds, given, 0.0))
    gpu_check.write(tmp_path, (), results, 1.0)
    said = json.loads((tmp_path / "gpu-check.json").read_text())["checks"]
    assert [(one["passed"], one["said"]) for one in said] == [
        (False, "it did not hold"), (False, "ZeroDivisionError: a mistake of ours"), (True, "it held"),
        (False, "left out: the time was over"),
    ]  # fmt: skip
    assert said[0]["figures"] == {"seen": 1}
    assert "1 passed, 3 fell" in (tmp_path / "gpu-check.txt").read_text()
    assert capsys.readouterr().out.count("FELL") == 3


@pytest.mark.usefixtures("_no_gpu")
def test_every_check_of_the_gpu_falls_without_one(tmp_path: Path) -> None:
    """None passes for want of anything to look at; those of the sandbox, and of the CPU on purpose, are not about the GPU."""
    given = Given.__new__(Given)
    given.folder, given.gpus, given.modes, given.lacking, given.shape = tmp_path, (), [], ["bubblewrap: none"], Shape()
    given.large = given.small = gguf_shapes.write(Shape(), tmp_path / "m.gguf", seed=1)
    for check in (gpu_check.instances, gpu_check.on_gpu, gpu_check.memory, gpu_check.leaks, gpu_check.taken_by_others):
        assert not gpu_check.ran(check, given, float("inf")).passed, check


def test_what_is_seen_of_the_driver_is_nothing_where_there_is_none() -> None:
    if devices.gpus():
        pytest.skip("this machine has a GPU")
    assert (gpu_check.used(), gpu_check.processes()) == (0, set())
    assert gpu_check.line_of(Result(name="a", passed=True, said="b")) == "passed  a (0.0 s): b"


def test_a_model_made_from_a_seed_is_the_same_each_time_and_another_with_another(tmp_path: Path) -> None:
    made = [gguf_shapes.write(Shape(), tmp_path / f"{number}.gguf", seed=seed).read_bytes() for number, seed in enumerate((1, 1, 2))]
    assert made[0] == made[1] != made[2]


def test_an_architecture_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bundle.main(["hopper"]) == 2
    assert "such as sm_90" in capsys.readouterr().out


def test_an_engine_without_cuda_is_not_taken_for_one_with_it() -> None:
    import llama_cpp

    assert gpu_backend.loads() == (b"CUDA" in llama_cpp.llama_print_system_info())
