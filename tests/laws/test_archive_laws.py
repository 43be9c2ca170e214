"""What holds for every archive: what is packed honestly comes out, and whatever comes in, it unpacks or is refused by name."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reconciler.core import archive_rules, snapshot
from reconciler.core.errors import UnpackRefused
from reconciler.core.node import Limits
from reconciler.unpack import zip_reader
from reconciler.unpack.extract import PlainUnpacker
from tests import archives, hostile_archives

LAWS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# -- honest archives

COMPONENTS = st.text(
    st.characters(categories=("L", "N", "P", "S", "Zs"), exclude_characters="/\\"),
    min_size=1,
    max_size=12,
).map(lambda text: unicodedata.normalize("NFC", text))


def _is_safe(path: str) -> bool:
    try:
        snapshot.check_path(path)
    except ValueError:
        return False
    return len(path.encode()) <= 100  # of ustar's name field; longer ones are packed in the examples below


PATHS = st.lists(COMPONENTS, min_size=1, max_size=4).map("/".join).filter(_is_safe)


def _fit_together(files: Mapping[str, bytes]) -> bool:
    """Whether *files* could lie on one disk, whatever it folds."""
    seen = archive_rules.Members(Limits(), 1 << 20)
    try:
        for path in files:
            archive_rules.check(seen, path, "file", 0)
    except UnpackRefused:
        return False
    return True


FILES = st.dictionaries(PATHS, st.binary(max_size=2000), max_size=8).filter(_fit_together)


def unpack(data: bytes, kind: str) -> dict[str, bytes]:
    """Unpack *data* and return what lies in the folder."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "archive").write_bytes(data)
        into = Path(name) / "into"
        into.mkdir()
        paths = PlainUnpacker().unpack(Path(name) / "archive", kind, into)
        found = {str(path.relative_to(into)): path.read_bytes() for path in into.rglob("*") if path.is_file()}
        assert tuple(sorted(found)) == paths
        return found


@pytest.mark.parametrize("kind", archives.KINDS)
@LAWS
@given(files=FILES)
def test_what_is_packed_by_the_standard_library_comes_out(kind: str, files: dict[str, bytes]) -> None:
    assert unpack(archives.honest(files, kind), kind) == files


@LAWS
@given(files=FILES)
def test_tars_of_bytes_and_of_the_standard_library_are_one(files: dict[str, bytes]) -> None:
    made = archives.tar(*(archives.member(path.encode(), data) for path, data in files.items()))
    with tarfile.open(fileobj=io.BytesIO(made)) as read:
        assert {one.name: (read.extractfile(one) or io.BytesIO()).read() for one in read} == files
    assert unpack(made, "tar") == files


@LAWS
@given(files=FILES)
def test_zips_of_bytes_and_of_the_standard_library_are_one(files: dict[str, bytes]) -> None:
    made = archives.zip_of(*(archives.Zipped(path.encode(), data, method=8) for path, data in files.items()))
    with zipfile.ZipFile(io.BytesIO(made)) as read:
        assert {name: read.read(name) for name in read.namelist()} == files
    assert unpack(made, "zip") == files


# -- honest archives that are less plain

NAMED = {"weights.gguf": os.urandom(70_000), "tokenizer/vocab.txt": b"a\nb\n", "empty": b"", "naïve": b"e"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for path, data in NAMED.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def _kind_of(option: str) -> str:
    return {"--gzip": "tar.gz", "--xz": "tar.xz", "--zstd": "tar.zst"}.get(option, "tar")


@pytest.mark.parametrize("option", ["--format=gnu", "--format=ustar", "--gzip", "--xz", "--zstd", "--blocking-factor=2048"])
@pytest.mark.parametrize("what", [".", "*"])
def test_what_plain_tar_writes_comes_out(source: Path, option: str, what: str) -> None:
    names = sorted(path.name for path in source.iterdir()) if what == "*" else [what]
    made = _run(source, "tar", "-cf", "-", option, "-C", str(source), *names)
    assert unpack(made, _kind_of(option)) == NAMED


def test_what_tar_writes_with_times_in_pax_headers_comes_out(source: Path) -> None:
    (source / "naïve").unlink()
    os.utime(source / "empty", ns=(1, 1_234_567_890_123_456_789))
    made = _run(source, "tar", "-cf", "-", "--format=posix", "-C", str(source), ".")
    assert b"mtime=" in made
    assert unpack(made, "tar") == {path: data for path, data in NAMED.items() if path != "naïve"}


def test_what_pythons_tarfile_adds_comes_out(source: Path) -> None:
    made = io.BytesIO()
    (source / "naïve").unlink()
    with tarfile.open(fileobj=made, mode="w") as written:
        written.add(source, arcname="model")
    assert unpack(made.getvalue(), "tar") == {f"model/{path}": data for path, data in NAMED.items() if path != "naïve"}


@pytest.mark.parametrize("option", ["-r", "-r0", "-rX", "-rD"])
def test_what_zip_writes_comes_out(source: Path, option: str) -> None:
    (source / "naïve").unlink()
    _run(source, "zip", option, "-q", "../made.zip", ".")
    streamed = _run(source, "zip", option, "-q", "-", ".")
    for made in ((source.parent / "made.zip").read_bytes(), streamed):
        assert unpack(made, "zip") == {path: data for path, data in NAMED.items() if path != "naïve"}


def _run(folder: Path, *command: str) -> bytes:
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed: what it writes cannot be read")
    return subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=60).stdout


def test_a_zip_that_was_written_without_seeking_comes_out() -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            self.data += bytes(data)  # type: ignore[call-overload]
            return len(bytes(data))  # type: ignore[call-overload]

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as written:
        written.writestr("a", b"x" * 100)
        with written.open("b", "w", force_zip64=True) as file:
            file.write(b"y" * 100)
    assert unpack(pipe.data, "zip") == {"a": b"x" * 100, "b": b"y" * 100}


def test_a_zip_of_more_members_than_sixteen_bits_hold_comes_out(tmp_path: Path) -> None:
    count = 65_536
    data = archives.honest({str(index): b"" for index in range(count)}, "zip")
    members = archive_rules.Members(Limits(), len(data))
    for path, body in zip_reader.entries(io.BytesIO(data), len(data), members):
        assert body is not None
        assert not list(body), path
    assert len(members.files) == count


def test_a_zip_whose_directory_is_in_another_order_comes_out() -> None:
    first, second = archives.Zipped(b"a", b"x"), archives.Zipped(b"b", b"y")
    data = archives.zip_of(first, second)
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    half = (start + end) // 2
    assert unpack(data[:start] + data[half:end] + data[start:half] + data[end:], "zip") == {"a": b"x", "b": b"y"}


# -- whatever comes in

SEEDS = tuple(
    (kind, data)
    for kind in archives.KINDS
    for data in (
        archives.honest({"a": b"one" * 50, "b/c": b"two" * 400, "d": b""}, kind),
        *[attack.data for attack in hostile_archives.attacks() if attack.kind == kind and len(attack.data) < 5000][::9],
    )
)


@settings(LAWS, max_examples=600)
@given(seed=st.sampled_from(SEEDS), changes=st.data())
def test_whatever_comes_in_it_unpacks_or_is_refused_by_name(seed: tuple[str, bytes], changes: st.DataObject) -> None:
    kind, data = seed
    mutant = bytearray(data)
    for _ in range(changes.draw(st.integers(0, 3))):
        at = changes.draw(st.integers(0, len(mutant)))
        verb = changes.draw(st.sampled_from(("flip", "cut", "splice", "repeat", "set", "drop")))
        if verb == "flip" and at < len(mutant):
            mutant[at] ^= 1 << changes.draw(st.integers(0, 7))
        elif verb == "cut":
            del mutant[at:]
        elif verb == "splice":
            other = changes.draw(st.sampled_from(SEEDS))[1]
            mutant[at:] = other[changes.draw(st.integers(0, len(other))) :]
        elif verb == "repeat":
            mutant[at:at] = mutant[at : at + 512]
        elif verb == "set":
            mutant[at : at + 4] = changes.draw(st.sampled_from((b"\xff" * 4, bytes(4), b"PK\x05\x06", b"\x00\x00\x00\x80")))
        else:
            del mutant[at : at + changes.draw(st.integers(1, 40))]
    _unpacks_or_refuses(bytes(mutant), kind)


@LAWS
@given(kind=st.sampled_from(archives.KINDS), data=st.binary(max_size=3000))
def test_noise_unpacks_or_is_refused_by_name(kind: str, data: bytes) -> None:
    _unpacks_or_refuses(data, kind)


@settings(LAWS, max_examples=150)
@given(data=st.binary(max_size=2000), name=st.binary(max_size=100), flag=st.integers(0, 255), kind=st.sampled_from(archives.KINDS[:4]))
def test_any_header_unpacks_or_is_refused_by_name(data: bytes, name: bytes, flag: int, kind: str) -> None:
    _unpacks_or_refuses(archives.packed(archives.tar(archives.member(name, data, kind=bytes([flag]))), kind), kind)


def _unpacks_or_refuses(data: bytes, kind: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "archive").write_bytes(data)
        into = Path(name) / "into"
        into.mkdir()
        with contextlib.suppress(UnpackRefused):  # and nothing else, so not that the disk is at fault either
            PlainUnpacker().unpack(Path(name) / "archive", kind, into)
        assert {path.name for path in Path(name).iterdir()} == {"archive", "into"}
        assert all(path.is_dir() or (path.is_file() and not path.is_symlink()) for path in into.rglob("*"))


@settings(LAWS, max_examples=200)
@given(names=st.lists(st.one_of(st.text(max_size=30), PATHS), max_size=8), kinds=st.lists(st.sampled_from(["file", "folder"]), min_size=8))
def test_members_that_were_taken_are_distinct_however_a_disk_folds_them(names: list[str], kinds: list[str]) -> None:
    seen = archive_rules.Members(Limits(), 1000)
    taken = []
    for name, kind in zip(names, kinds, strict=False):
        try:
            taken.append(archive_rules.check(seen, name, kind, 0))
        except UnpackRefused:
            break
    folded = [unicodedata.normalize("NFD", path).casefold() for path in taken if path]
    assert len(set(folded)) == len(folded)
    for path in taken:
        assert os.path.normpath(f"/store/{path}") == f"/store/{path}".removesuffix("/")
