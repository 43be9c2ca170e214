"""Which device files a test job on a GPU is given, seen on folders made like /dev, and what is said of those that are missing or closed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from reconciler.commands import engine_checks
from reconciler.core.node import Gpu
from reconciler.runtime import device_nodes
from reconciler.settings import LlamaCppSettings, Runtimes
from tests.demand import needs_root

WHOLE = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia0", "nvidia1")


def dev(folder: Path, *names: str, mode: int = 0o666) -> Path:
    """Return a folder like /dev with plain files in place of devices: what is decided depends on names and permissions alone."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.chmod(mode)
    return folder


def given(place: Path, *, nvidia: bool = True, mig: bool = False) -> list[str]:
    return [path.relative_to(place).as_posix() for path in device_nodes.find(place, nvidia=nvidia, mig=mig).given]


def test_what_computing_needs_is_given_and_nothing_of_displays_switches_and_profilers(tmp_path: Path) -> None:
    others = ("nvidia-modeset", "nvidia-nvswitchctl", "nvidia-nvswitch0", "nvidia-fs0", "dri/card0", "sda", "mem", "nvidia0.bak", "nvme0")
    place = dev(tmp_path, *WHOLE, *others)
    found = device_nodes.find(place, nvidia=True)
    assert given(place) == sorted(WHOLE)
    assert found.lacking == ()


def test_a_mig_slice_comes_with_its_capabilities(tmp_path: Path) -> None:
    place = dev(tmp_path, *WHOLE, "nvidia-caps/nvidia-cap21", "nvidia-caps/nvidia-cap22", "nvidia-caps/other")
    assert given(place, mig=True) == sorted([*WHOLE, "nvidia-caps/nvidia-cap21", "nvidia-caps/nvidia-cap22"])
    assert device_nodes.find(place, nvidia=True, mig=True).lacking == ()


def test_a_mig_slice_without_capabilities_is_named(tmp_path: Path) -> None:
    place = dev(tmp_path, *WHOLE)
    (why,) = device_nodes.find(place, nvidia=True, mig=True).lacking
    assert why.startswith(f"{place}/nvidia-caps has no file, and without one no MIG slice can be opened: ")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("nvidia-uvm", "nvidia-uvm is missing: run `nvidia-modprobe -u -c 0` as root"),
        ("nvidiactl", "nvidiactl is missing: run `nvidia-modprobe` as root"),
        ("nvidia0", "nvidia0 is missing, and every other GPU's file: run `nvidia-modprobe -c 0` as root"),
    ],
)
def test_a_missing_file_is_named_with_what_makes_it_and_the_others_are_given(tmp_path: Path, missing: str, words: str) -> None:
    names = {"nvidiactl", "nvidia-uvm", "nvidia0"} - {missing}
    place = dev(tmp_path, *names)
    found = device_nodes.find(place, nvidia=True)
    assert found.lacking == (f"{place}/{words}",)
    assert given(place) == sorted(names)


def test_a_file_that_this_user_may_not_open_is_named_with_its_mode_and_group() -> None:
    needs_root("to look as another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        place = dev(Path(folder), *WHOLE)
        (place / "nvidia0").chmod(0o660)
        said = _as_nobody(place)
        group = (place / "nvidia0").group()
    assert said == [f"{place}/nvidia0 may not be opened by this user: its mode is 0660, its group {group}"]


def _as_nobody(place: Path) -> list[str]:
    """Look at *place* as a user without rights, in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os.write(writer, "\n".join(device_nodes.find(place, nvidia=True).lacking).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said.splitlines()


def test_the_windows_subsystem_has_one_device_and_lacks_none_of_the_others(tmp_path: Path) -> None:
    found = device_nodes.find(dev(tmp_path, "dxg"), nvidia=True)
    assert (given(tmp_path), found.lacking) == (["dxg"], ())


def test_without_a_gpu_that_can_compute_no_file_is_given_whatever_is_there(tmp_path: Path) -> None:
    place = dev(tmp_path, *WHOLE, "dxg", "dri/renderD128")
    assert device_nodes.find(place, nvidia=False) == device_nodes.DeviceNodes()


def test_amd_s_files_are_given_where_it_can_compute(tmp_path: Path) -> None:
    place = dev(tmp_path, "kfd", "dri/renderD128")
    assert given(place, nvidia=False) == ["dri", "kfd"]


def test_doctor_names_what_keeps_test_jobs_from_a_gpu_and_a_driver_that_names_none(tmp_path: Path) -> None:
    gpu = Gpu(name="G", total_bytes=1, free_bytes=1, index=0)
    place = dev(tmp_path, "nvidiactl", "nvidia0")
    found = list(engine_checks.gpu_access(Runtimes(), (gpu,), place))
    assert ("gpu device", "warning", f"{place}/nvidia-uvm is missing: run `nvidia-modprobe -u -c 0` as root") in [one[:3] for one in found]
    ((name, level, text, hint),) = engine_checks.gpu_access(Runtimes(), (), place)
    assert (name, level, text) == ("gpu", "warning", "a driver is here, and names no GPU")
    assert hint == "`nvidia-smi -L` lists them; libnvidia-ml.so.1 must be found: name its folder in [runtime.llama-cpp] library_path"
    on_cpu = Runtimes(llama_cpp=LlamaCppSettings(gpu_layers=0))
    assert list(engine_checks.gpu_access(on_cpu, (gpu,), place)) == []


def test_doctor_says_of_an_amd_gpu_what_is_not_read_of_it(tmp_path: Path) -> None:
    ((name, level, text, hint),) = engine_checks.gpu_access(Runtimes(), (), dev(tmp_path, "kfd", "dri/renderD128"))
    assert (name, level) == ("gpu amd", "warning")
    assert "its memory is not read" in text
    assert hint == "engines that are built for it use it in test jobs all the same"
