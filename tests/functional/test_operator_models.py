"""Models that the network's operators add to a snapshot: from files, archives and addresses, as it is typed."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from reconciler.cli import run
from reconciler.core.errors import ReconcileError
from reconciler.demo import models
from tests import archives
from tests.functional.test_operator import Terminal, accepted, ready, terminal

__all__ = ["ready", "terminal"]


def test_a_model_without_an_address_is_noted(ready: Terminal) -> None:
    ready("snapshot add snapshot.json tiny:v2 tiny.gguf")
    assert "note: no --url is given" in ready.err


def gguf_of(path: Path, kind: Literal["chat", "embedding"]) -> bytes:
    """Return a tiny real model, written to *path*."""
    models.write(models.Shape(seed="seed", kind=kind, width=64), path)
    return path.read_bytes()


def test_what_a_gguf_header_tells_is_filled_in_and_said_to_be_an_estimate(ready: Terminal) -> None:
    data = gguf_of(ready.folder / "chat.gguf", "chat")
    ready("snapshot add snapshot.json chat:v1 chat.gguf --url https://models.example.org/chat.gguf")
    assert "GGUF header: llama, " in ready.out
    assert "note: the GPU memory is an estimate" in ready.err
    added = next(one for one in ready.json("snapshot inspect snapshot.json")["models"] if one["id"] == "chat:v1")
    assert added["tasks"] == ["chat", "completion"]
    assert added["gpu_memory"] > len(data) / 2
    with serving(sends(data)) as url:
        ready(f"snapshot add snapshot.json chat:v2 {url}/chat.gguf --gpu-memory 0 --task chat")
    assert "an estimate" not in ready.err
    assert "no GPU memory" in ready.out


def test_an_embedding_model_is_tested_for_its_dimension(ready: Terminal) -> None:
    gguf_of(ready.folder / "e.gguf", "embedding")
    ready("snapshot add snapshot.json e:v1 e.gguf --url https://models.example.org/e.gguf")
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key")
    added = accepted(ready).snapshot.models[1]
    assert added.tasks == ("embedding",)
    assert added.smoke.expect.dimension == 64
    assert added.smoke.expect.min_tokens == 0


def test_a_malformed_gguf_is_added_with_a_warning(ready: Terminal) -> None:
    (ready.folder / "cut.gguf").write_bytes(gguf_of(ready.folder / "whole.gguf", "chat")[:2000])
    for name in ("tiny.gguf", "cut.gguf"):
        ready(f"snapshot add snapshot.json {name[:4]}:v9 {name} --url https://models.example.org/{name}")
        assert "note: an engine may refuse this" in ready.err


# -- a model in an archive -------------------------------------------------------------------------


def test_an_archive_that_nodes_take_is_added_and_its_model_is_found_in_it(ready: Terminal) -> None:
    (ready.folder / "good.tar").write_bytes(archives.tar(archives.member(b"m/a.gguf", b"model"), archives.member(b"m/LICENSE", b"text")))
    ready("snapshot add snapshot.json packed:v1 good.tar --unpack tar --url https://models.example.org/good.tar")
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key")
    assert accepted(ready).snapshot.models[1].entrypoint == "m/a.gguf"


@pytest.mark.parametrize(
    ("name", "packed", "why"),
    [
        ("a.tar", archives.tar(archives.pax({"GNU.sparse.major": "1"}), archives.member(b"m", b"x")), "carries 'GNU.sparse.major'"),
        ("a.tar", archives.tar(archives.member(b"././@LongLink", b"m" * 300, kind=b"L"), archives.member(b"m", b"x")), "GNU long name"),
        ("a.tar", archives.tar(archives.member(b"l", kind=b"2", link=b"../m"), archives.member(b"m", b"x")), "leads out of the archive"),
        ("a.tar", archives.tar(archives.member(b"../m", b"x")), "'../m'"),
        ("a.tar", archives.tar(archives.member(b"m", b"x"))[:700], "cut short"),
        ("a.tar.gz", archives.tar(archives.member(b"m", b"x")), "stream cannot be read"),
        ("a.zip", b"no archive", ""),
    ],
    ids=["pax", "long-name", "link", "parent", "cut", "not-packed", "no-zip"],
)
def test_an_archive_that_nodes_would_refuse_is_not_added(ready: Terminal, name: str, packed: bytes, why: str) -> None:
    """By the very check that nodes make: it must not pass here and fail on a thousand of them."""
    before = ready.bytes("snapshot.json")
    (ready.folder / name).write_bytes(packed)
    ready(f"snapshot add snapshot.json packed:v1 {name} --entrypoint m --unpack {name[2:]}", code=1)
    assert f"error[unpack-refused]: every node would refuse {name}: " in ready.err
    assert why in ready.err
    assert "hint: " in ready.err
    assert "pack" in ready.err.partition("hint: ")[2]
    assert ready.bytes("snapshot.json") == before


def test_what_an_archive_lacks_is_no_entrypoint(ready: Terminal) -> None:
    (ready.folder / "a.tar").write_bytes(archives.tar(archives.member(b"m/a.gguf", b"model")))
    ready("snapshot add snapshot.json packed:v1 a.tar --unpack tar --entrypoint a.gguf", code=1)
    assert "no archive contains the entrypoint 'a.gguf'" in ready.err
    assert "hint: they contain: m/a.gguf" in ready.err
    (ready.folder / "b.tar").write_bytes(ready.bytes("a.tar") + bytes(512))
    ready("snapshot add snapshot.json packed:v1 a.tar b.tar --unpack tar", code=1)
    assert "two of them contain 'm/a.gguf'" in ready.err


def test_an_archive_at_an_address_is_said_not_to_have_been_looked_at(ready: Terminal) -> None:
    with serving(sends(archives.tar(archives.member(b"m", b"x")))) as url:
        ready(f"snapshot add snapshot.json packed:v1 {url}/a.tar --unpack tar --entrypoint m")
    assert "note: an archive at a URL is not checked" in ready.err


# -- a model at a URL ------------------------------------------------------------------------------

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def sends(data: bytes, *, status: int = 200, length: int | None = None, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        if length != -1:
            handler.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        with contextlib.suppress(OSError):
            handler.wfile.write(data)

    return answer


def test_a_url_is_measured_and_is_where_nodes_fetch_it(ready: Terminal) -> None:
    data = bytes(range(256)) * 5000
    with serving(sends(data)) as url:
        ready(f"snapshot add snapshot.json remote:v1 {url}/models/remote%20one.gguf?version=2 --url https://mirror.example.org/x")
    assert "note: a URL has a query" in ready.err
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key")
    (artifact,) = accepted(ready).snapshot.models[1].artifacts
    assert (artifact.digest, artifact.size) == (f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))
    assert artifact.path == "remote one.gguf"
    assert artifact.urls == (f"{url}/models/remote%20one.gguf?version=2", "https://mirror.example.org/x")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (sends(b"half", length=8), "ended after 4 of 8 bytes"),
        (sends(b"data", length=-1), "does not state its length"),
        (sends(b"data", Content_Encoding="gzip"), "compressed"),
        (sends(b"gone", status=404), "answered 404"),
        (sends(b"", status=302, Location="http://models.example.org/x"), "plain http is refused"),
        (sends(b"", status=302, Location="file:///etc/passwd"), "file"),
        (sends(b"", status=302, Location="/again"), "redirect"),
        (sends(b"0" * 2000), "more than 1,024 bytes"),
        (sends(b""), "empty"),
    ],
    ids=["cut", "unsized", "compressed", "missing", "plain-http", "file", "loop", "endless", "empty"],
)
def test_a_server_that_lies_or_fails_is_refused_and_nothing_is_added(ready: Terminal, answer: Answer, why: str) -> None:
    before = ready.bytes("snapshot.json")
    with serving(answer) as url:
        assert run(["snapshot", "add", "snapshot.json", "remote:v1", f"{url}/x.gguf", "--max-size", "1KiB"]) in {1, 4}
    ready("key show alice.pub")
    assert why in ready.err
    assert ready.bytes("snapshot.json") == before


def test_a_document_that_drips_in_is_given_up(tmp_path: Path) -> None:
    """Slow retrieval: one byte in each timeout would hold a node's lock for ever."""
    del tmp_path
    done = threading.Event()

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not done.wait(0.02):
                handler.wfile.write(b"x")

    from reconciler.fetch import http

    with serving(drip) as url:
        try:
            with pytest.raises(ReconcileError, match="and is not done"):
                http.get(f"{url}/snapshot.json", max_bytes=10**9, timeout_seconds=0.3)
        finally:
            done.set()


def test_a_pointer_to_a_model_is_not_published_for_it(ready: Terminal) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'46' * 32}\nsize 4368438944\n"
    (ready.folder / "model.gguf").write_text(pointer)
    before = ready.bytes("snapshot.json")

    ready("snapshot add snapshot.json m:v1 model.gguf", code=1)

    assert f"model.gguf is a git LFS pointer to sha256:{'46' * 32}, 4,368,438,944 bytes (4.1 GiB)" in ready.err
    assert "git lfs pull" in ready.err
    assert ready.bytes("snapshot.json") == before


def test_a_model_of_another_format_is_noted_with_what_it_is(ready: Terminal) -> None:
    (ready.folder / "model.gguf").write_bytes((64).to_bytes(8, "little") + b"{" + b" " * 63 + bytes(64))

    ready("snapshot add snapshot.json m:v1 model.gguf --url https://models.example.org/model.gguf")

    assert "note: an engine may refuse this file: model.gguf is a safetensors file; convert it to GGUF" in ready.err
