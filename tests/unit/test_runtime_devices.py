"""GPUs as facts: quick and silent where there is none, and no device is given to a test job that needs none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reconciler.core.node import Gpu
from reconciler.runtime import devices

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
    assert not any(path.name.startswith("nvidia") for path in devices.device_files(()))


def test_a_display_is_no_reason_to_give_its_device() -> None:
    assert Path("/dev/kfd").exists() or Path("/dev/dri") not in devices.device_files((BIG,))
