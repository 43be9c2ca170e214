"""
Archives as people make them: with GNU tar, bsdtar, 7-Zip, and Python's ``tarfile`` and ``zipfile``, long names, links and large members.

What bsdtar 3.6 and 7-Zip 26.02 made is kept in ``tests/archives_as_made``, so that it is read where they are not installed.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from reconciler.core.archive_rules import Members
from reconciler.core.errors import UnpackRefused
from reconciler.core.node import Limits
from reconciler.unpack import extract, tar_reader
from reconciler.unpack.extract import PlainUnpacker
from tests import archives

KEPT = Path(__file__).parents[1] / "archives_as_made"
LONG, DEEP = "n" * 130, f"{'d' * 60}/{'d' * 60}"
FILES = {"a.txt": "hi\n", f"sub/{LONG}": "deep\n", "ü.txt": "u\n", f"{DEEP}/split.txt": "p\n"}
#: What a link is when it is unpacked: a copy of what it leads to.
LINKS = {"hard": "hi\n", "link": "deep\n"}
LARGE = 9 << 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "hard").hardlink_to(folder / "a.txt")
    (folder / "link").symlink_to(f"sub/{LONG}")
    return folder


def unpacked(archive: Path, kind: str, into: Path) -> dict[str, str]:
    into.mkdir()
    paths = PlainUnpacker().unpack(archive, kind, into)
    assert not any((into / path).is_symlink() or (into / path).stat().st_nlink != 1 for path in paths)
    return {path: (into / path).read_text() for path in paths}


def tarred(form: int) -> Callable[[Path, Path], None]:
    def make(model: Path, target: Path) -> None:
        with tarfile.open(target, "w", format=form) as archive:
            archive.add(model, ".")

    return make


def command(*words: str, inside: bool = False) -> Callable[[Path, Path], None]:
    def make(model: Path, target: Path) -> None:
        line = [word.format(model=model, target=target) for word in words]
        subprocess.run(line, check=True, cwd=model if inside else None, capture_output=True, timeout=60)

    return make


MADE: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "GNU tar, gnu": ("tar", command("tar", "--format=gnu", "-C", "{model}", "-cf", "{target}", ".")),
    "GNU tar, posix": ("tar", command("tar", "--format=posix", "-C", "{model}", "-cf", "{target}", ".")),
    "GNU tar, from a list": ("tar", command("sh", "-c", "find * -type f -o -type l | tar -cf {target} -T -", inside=True)),
    "Python, pax": ("tar", tarred(tarfile.PAX_FORMAT)),
    "Python, gnu": ("tar", tarred(tarfile.GNU_FORMAT)),
    "bsdtar": ("tar", command("bsdtar", "-C", "{model}", "-cf", "{target}", ".")),
    "bsdtar, pax": ("tar", command("bsdtar", "--format", "pax", "-C", "{model}", "-cf", "{target}", ".")),
    "bsdtar, gnu": ("tar", command("bsdtar", "--format", "gnutar", "-C", "{model}", "-cf", "{target}", ".")),
    "bsdtar, zip": ("zip", command("bsdtar", "--format", "zip", "-C", "{model}", "-cf", "{target}", ".")),
    "7-Zip, gnu": ("tar", command("7z", "a", "-ttar", "-snl", "-snh", "{target}", ".", inside=True)),
    "7-Zip, pax": ("tar", command("7z", "a", "-ttar", "-mm=pax", "-snl", "{target}", ".", inside=True)),
    "7-Zip, zip": ("zip", command("7z", "a", "-tzip", "{target}", ".", inside=True)),
}
_NEEDS = {"bsdtar": "libarchive-tools", "7z": "p7zip-full"}


@pytest.mark.parametrize("name", MADE)
def test_an_archive_is_unpacked_as_its_program_made_it(name: str, model: Path, tmp_path: Path) -> None:
    program = {"bsdtar": "bsdtar", "7-Zip": "7z"}.get(name.partition(",")[0])
    if program and shutil.which(program) is None:
        pytest.skip(f"{program} is not installed here: apt install {_NEEDS[program]}; what it made once is read all the same")
    kind, make = MADE[name]
    target = tmp_path / f"archive.{kind}"
    make(model, target)
    assert unpacked(target, kind, tmp_path / "into") == FILES | LINKS


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.tar.gz")) + sorted(KEPT.glob("*.zip")), ids=lambda path: path.name)
def test_what_other_programs_made_is_unpacked(path: Path, tmp_path: Path) -> None:
    assert unpacked(path, "zip" if path.suffix == ".zip" else "tar.gz", tmp_path / "into") == FILES | LINKS


def test_python_packs_a_zip(model: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in FILES:
            archive.write(model / name, name)
    assert unpacked(tmp_path / "a.zip", "zip", tmp_path / "into") == FILES


def test_gnu_tar_packs_what_ustar_can_hold(model: Path, tmp_path: Path) -> None:
    (model / "link").unlink()
    (model / "sub" / LONG).unlink()
    target = tmp_path / "a.tar"
    command("tar", "--format=ustar", "-C", "{model}", "-cf", "{target}", ".")(model, target)
    left = {name: text for name, text in (FILES | LINKS).items() if text != "deep\n"}
    assert unpacked(target, "tar", tmp_path / "into") == left


@pytest.mark.parametrize("forward", [True, False])
def test_a_chain_of_links_that_stay_inside_becomes_copies(tmp_path: Path, forward: bool) -> None:
    one = archives.member(b"a/b/model.gguf", kind=b"2", link=b"../../blobs/x")
    two = archives.member(b"current.gguf", kind=b"2", link=b"a/b/model.gguf")
    blob = archives.member(b"blobs/x", b"bytes")
    (tmp_path / "a.tar").write_bytes(archives.tar(*((two, one, blob) if forward else (blob, one, two))))
    assert unpacked(tmp_path / "a.tar", "tar", tmp_path / "into") == dict.fromkeys(("blobs/x", "a/b/model.gguf", "current.gguf"), "bytes")


# -- members of 8 GiB and more ---------------------------------------------------------------------------------


def _by_tar(form: str, folder: Path) -> bytes:
    with (folder / "big").open("wb") as file:
        file.truncate(LARGE)
    with subprocess.Popen(["tar", f"--format={form}", "-C", str(folder), "-cf", "-", "big"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        head = process.stdout.read(4096)
        process.kill()
    return head.rstrip(b"\0") + bytes(-len(head.rstrip(b"\0")) % 512)


def _by_python(form: Literal[1, 2]) -> bytes:
    info = tarfile.TarInfo("big")
    info.size = LARGE
    assert (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) == (1, 2)
    return info.tobuf(form)


HEADS: dict[str, Callable[[Path], bytes]] = {
    "GNU tar, gnu": lambda folder: _by_tar("gnu", folder),
    "GNU tar, posix": lambda folder: _by_tar("posix", folder),
    "Python, gnu": lambda _: _by_python(1),
    "Python, pax": lambda _: _by_python(2),
    **{path.name: lambda _, path=path: gzip.decompress(path.read_bytes()) for path in sorted(KEPT.glob("*.head.gz"))},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", HEADS)
def test_a_member_of_nine_gibibytes_is_read_to_its_end(name: str, tmp_path: Path) -> None:
    zeros = bytes(1 << 20)

    def pieces() -> Iterator[bytes]:
        yield HEADS[name](tmp_path)
        for _ in range(LARGE // len(zeros)):
            yield zeros
        yield archives.tar(archives.member(b"after", b"x"))

    found = {}
    for path, body in tar_reader.entries(pieces(), Members(Limits(), LARGE)):
        assert body is not None
        found[path] = sum(map(len, body))
    assert found == {"big": LARGE, "after": 1}


@pytest.mark.parametrize("strange", ["link", "fifo"])
def test_a_copy_of_what_another_put_in_the_place_of_a_file_is_refused(tmp_path: Path, strange: str) -> None:
    (tmp_path / "secret").write_bytes(b"not of the archive")
    target = tmp_path / "made"
    target.mkdir()
    with extract._open_empty(target) as folder:
        folder.write("a", iter([b"bytes"]))
        (target / "a").unlink()
        if strange == "link":
            (target / "a").symlink_to(tmp_path / "secret")
        else:
            os.mkfifo(target / "a")

        with pytest.raises((UnpackRefused, OSError)):
            folder.copy("a", "b")
    assert not (target / "b").exists()
