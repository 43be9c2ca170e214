"""What stands where a model should be is named by its first bytes, with what to do about it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core import file_type, gguf
from reconciler.core.errors import PublishError
from reconciler.publish import artifacts
from tests import gguf_files as files

OID = "sha256:" + "4665" * 16


def tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("model.gguf"), io.BytesIO())
    return made.getvalue()


def zipped(name: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(name, b"x" * 100)
    return made.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


SOUND = files.whole().encode()
POINTER = f"version https://git-lfs.github.com/spec/v1\noid {OID}\nsize 4368438944\n".encode()
#: The file, the word, what the message says, and what its hint says.
CASES: tuple[tuple[str, bytes, str, str], ...] = (
    ("gguf-big-endian", b"GGUF" + struct.pack(">I", 3) + bytes(64), "a big-endian GGUF file (version 3)", "gguf_convert_endian"),
    ("gguf-big-endian", b"FUGG" + struct.pack(">I", 3) + bytes(64), "a big-endian GGUF file", "gguf_convert_endian"),
    ("ggml", struct.pack("<I", 0x67676D6C) + bytes(64), "an old GGML file", "before GGUF"),
    ("ggml", struct.pack("<II", 0x67676D66, 1) + bytes(64), "an old GGMF file", "before GGUF"),
    ("ggml", struct.pack("<II", 0x67676A74, 3) + bytes(64), "an old GGJT file", "before GGUF"),
    ("safetensors", safetensors(), "a safetensors file", "convert"),
    ("lfs-pointer", POINTER, f"a git LFS pointer to {OID}, 4,368,438,944 bytes (4.1 GiB)", "git lfs pull"),
    ("lfs-pointer", POINTER.replace(b"oid", b"ext-0-foo sha256:1\noid"), "a git LFS pointer", "git lfs pull"),
    ("annex-pointer", b"/annex/objects/SHA256E-s123--abc.gguf\n", "a git-annex pointer", "git annex get"),
    ("html", b"\n<!DOCTYPE html><html><head><title>Sign\n in</title>", 'a web page ("Sign in")', "login"),
    ("html", b"\xef\xbb\xbf<!-- x --><HTML>", "a web page", "login"),
    ("xml", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', 'an XML document ("AccessDenied")', "again"),
    ("json", b'{"error":"Repository not found"}', 'a JSON document ("Repository not found")', "again"),
    ("text", b"Entry not found", 'a text that begins "Entry not found"', "again"),
    ("text", "Zugriff verweigert: ä".encode(), "Zugriff verweigert", "again"),
    ("empty", b"", "an empty file", "again"),
    ("zeros", bytes(5000), "zero bytes: a download that did not end?", "again"),
    ("aria2-control", b"\x00\x01" + bytes(8) + b"\x00\x10\x00\x00" + bytes(20), "a control file of aria2", "again"),
    ("gzip", gzip.compress(b"x"), "a gzip archive", "--unpack tar.gz"),
    ("zip", zipped("model.gguf"), "a zip archive", "--unpack zip"),
    ("xz", lzma.compress(b"x"), "an xz archive", "--unpack tar.xz"),
    ("zstd", zstandard.compress(b"x"), "a Zstandard archive", "--unpack tar.zst"),
    ("tar", tar(), "a tar archive", "--unpack tar"),
    ("bzip2", bz2.compress(b"x"), "a bzip2 archive", "pack it again"),
    ("7z", b"7z\xbc\xaf\x27\x1c" + bytes(26), "a 7z archive", "pack it again"),
    ("pickle", pickle.dumps({"w": [1.0]}), "a Python pickle", "convert"),
    ("pytorch", zipped("archive/data.pkl"), "a PyTorch checkpoint", "convert"),
    ("onnx", b"\x08\x07\x12\x07pytorch\x1a\x051.9.0", "an ONNX model", "convert"),
    ("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(32), "an HDF5 file", "convert"),
)
IDS = [f"{index}-{name}" for index, (name, *_) in enumerate(CASES)]


@pytest.mark.parametrize(("name", "data", "text", "hint"), CASES, ids=IDS)
def test_it_is_named_with_what_to_do(name: str, data: bytes, text: str, hint: str) -> None:
    found = file_type.identify(data[: file_type.HEAD_BYTES], len(data))
    assert found.name == name
    assert text in found.text
    assert hint in found.hint


@pytest.mark.parametrize(("data", "text"), [(data, text) for _, data, text, _ in CASES], ids=IDS)
def test_the_check_of_a_model_names_it(tmp_path: Path, data: bytes, text: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(gguf.Malformed) as refused:
        gguf.check(path)
    assert text in str(refused.value)


def test_a_sound_file_is_a_gguf_file_and_noise_is_nothing_that_is_known() -> None:
    assert file_type.identify(SOUND[:4096], len(SOUND)).name == "gguf"
    assert file_type.identify(b"\x13\x37\xff\xfe" * 100, 400).name == "unknown"


@given(st.binary(max_size=300), st.integers(0, 2**63))
def test_any_bytes_are_named_in_one_printable_line(head: bytes, size: int) -> None:
    found = file_type.identify(head, size)
    assert found.text.isprintable()
    assert len(found.text) < 400


@given(st.sampled_from([b"<html><title>", b'{"error":"', b"<?xml?><Code>", b""]), st.text(max_size=300))
def test_what_a_page_says_of_itself_is_short_and_printable(begin: bytes, text: str) -> None:
    data = begin + text.encode(errors="replace") + b'</title>"}</Code>'
    found = file_type.identify(data, len(data))
    assert found.text.isprintable()
    assert len(found.text) < 400


# -- what an operator is about to publish ----------------------------------------------------------


def measured(data: bytes) -> artifacts.Measured:
    return artifacts.measure([data], head_bytes=1 << 20)


@pytest.mark.parametrize("name", ["lfs-pointer", "annex-pointer", "aria2-control", "html", "xml", "json", "zeros"])
def test_what_nobody_publishes_on_purpose_is_refused(name: str) -> None:
    data = next(data for case, data, _, _ in CASES if case == name)
    with pytest.raises(PublishError, match=r"model\.gguf is "):
        artifacts.refuse_substitute("model.gguf", measured(data))


def test_a_licence_and_an_archive_are_published_as_what_they_are() -> None:
    for name, data in (("LICENSE", b"Apache License"), ("index.html", b"<html>"), ("config.json", b'{"a":1}'), ("m.zip", zipped("m"))):
        artifacts.refuse_substitute(name, measured(data))


@pytest.mark.parametrize("suffix", [".aria2", ".part", ".crdownload", ".incomplete"])
def test_a_download_that_did_not_end_is_not_published(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(SOUND)
    (tmp_path / f"model.gguf{suffix}").write_bytes(b"")
    for partial in (path, tmp_path / f"model.gguf{suffix}"):
        with pytest.raises(PublishError, match="a download that did not end"):
            list(artifacts.read_chunks(partial, max_bytes=1 << 20))


def test_a_file_that_ends_in_zeros_is_said_to_be_half_downloaded() -> None:
    chunks = [SOUND, bytes(1 << 20), bytes(1 << 19)]
    found = artifacts.measure(chunks, head_bytes=1 << 20)
    assert found.trailing_zeros >= 3 << 19
    with pytest.raises(gguf.Malformed, match="zero bytes: a download that did not end"):
        artifacts.gguf_facts(found)
    assert artifacts.measure([*chunks, b"x"]).trailing_zeros == 0


def test_a_header_whose_tensors_reach_past_the_end_is_said_to_be_of_no_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(SOUND[:-64])
    with pytest.raises(gguf.Malformed, match="it is not whole"):
        gguf.check(path)
