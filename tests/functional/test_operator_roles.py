"""The network's operator adds models of several files: roles are taken from headers and names, and what nodes would refuse is refused."""

from __future__ import annotations

import shlex

import pytest

from tests import model_files
from tests.functional.test_operator import Terminal, ready, terminal
from tests.network import Document, payload_of
from tests.node import tiny

__all__ = ["ready", "terminal"]  # fixtures
URL = "--url https://models.example.org/{path}"


def put(at: Terminal, **files: bytes) -> None:
    for name, data in files.items():
        (at.folder / name).write_bytes(data)


def listed(at: Terminal, model: str = "many:v1") -> Document:
    found: Document = next(one for one in payload_of(at.bytes("snapshot.json"))["models"] if f"{one['name']}:{one['version']}" == model)
    return found


def roles(at: Terminal, model: str = "many:v1") -> dict[str, str | None]:
    return {one["path"]: one.get("role") for one in listed(at, model)["artifacts"]}


def add(at: Terminal, *sources: str, more: str = "", code: int = 0) -> str:
    return at(f"snapshot add snapshot.json many:v1 {shlex.join(sources)} {URL} {more}", code=code)


def test_roles_are_taken_from_headers_and_names(ready: Terminal) -> None:
    files = {
        "m.gguf": tiny("a"), "a-projector.gguf": model_files.projector(), "adapter.gguf": model_files.lora(), "m-draft.gguf": tiny("d"),
        "tokenizer.json": b"{}", "config.json": b"{}", "chat_template.jinja": b"x", "LICENSE": b"x", "README.md": b"x", "empty.txt": b"",
    }  # fmt: skip
    put(ready, **files)

    said = add(ready, *files)

    assert roles(ready) == {
        "m.gguf": None, "a-projector.gguf": "mmproj", "adapter.gguf": "lora", "m-draft.gguf": "draft", "tokenizer.json": "tokenizer",
        "config.json": "config", "chat_template.jinja": "template", "LICENSE": "licence", "README.md": "other", "empty.txt": "other",
    }  # fmt: skip
    assert "roles: a-projector.gguf mmproj, adapter.gguf lora, m-draft.gguf draft" in said


def test_the_entrypoint_is_the_model_and_not_the_file_that_sorts_first(ready: Terminal) -> None:
    put(ready, **{"a-projector.gguf": model_files.projector(), "m.gguf": tiny("a")})
    add(ready, "a-projector.gguf", "m.gguf")
    assert listed(ready)["entrypoint"] == "m.gguf"


def test_a_single_model_has_no_role_as_before(ready: Terminal) -> None:
    assert roles(ready, "tiny:v1") == {"tiny.gguf": None}


def test_a_model_that_is_named_a_draft_may_stand_alone(ready: Terminal) -> None:
    put(ready, **{"tiny-draft.gguf": tiny("d")})
    add(ready, "tiny-draft.gguf")
    assert roles(ready) == {"tiny-draft.gguf": None}


def test_a_split_model_gets_its_roles(ready: Terminal) -> None:
    parts = model_files.split("a")
    put(ready, **parts)
    add(ready, *parts)
    assert list(roles(ready).values()) == [None, "split", "split"]


@pytest.mark.parametrize(("gone", "said"), [(0, "split 1 of 3 is missing"), (1, "split 2 of 3 is missing"), (2, "split 3 of 3 is missing")])
def test_a_missing_split_is_refused_by_its_number(ready: Terminal, gone: int, said: str) -> None:
    parts = model_files.split("a")
    put(ready, **parts)
    before = ready.bytes("snapshot.json")
    add(ready, *[path for index, path in enumerate(parts) if index != gone], code=1)
    assert said in ready.err
    assert ready.bytes("snapshot.json") == before


def test_a_renamed_split_is_refused_by_its_number(ready: Terminal) -> None:
    first, second, third = model_files.split("a").values()
    put(ready, **{"tiny-00001-of-00003.gguf": first, "second.gguf": second, "tiny-00003-of-00003.gguf": third})
    add(ready, "tiny-00001-of-00003.gguf", "second.gguf", "tiny-00003-of-00003.gguf", code=1)
    assert "split 2 of 3 is missing: 'second.gguf' is that split by its header" in ready.err


def test_an_extra_split_is_refused(ready: Terminal) -> None:
    parts = model_files.split("a")
    put(ready, **parts, **{"tiny-00004-of-00003.gguf": list(parts.values())[2]})
    add(ready, *parts, "tiny-00004-of-00003.gguf", code=1)
    assert "'tiny-00004-of-00003.gguf' is one split too many" in ready.err


@pytest.mark.parametrize(
    ("role", "said"),
    [
        ("x.gguf=lora", "x.gguf: its role is 'lora', and by its header it is a projector (mmproj)"),
        ("x.gguf=model", "x.gguf: its role is 'model', and by its header it is a projector (mmproj)"),
        ("notes.txt=mmproj", "notes.txt: its role is 'mmproj', and it is no GGUF file"),
        ("y.gguf=mmproj", "--role names 'y.gguf', which is none of the files"),
        ("x.gguf=adapter", "--role 'x.gguf=adapter' is not NAME=ROLE"),
        ("m.gguf=draft", "the entrypoint m.gguf has the role 'draft'"),
    ],
)
def test_a_role_that_contradicts_the_header_is_refused(ready: Terminal, role: str, said: str) -> None:
    put(ready, **{"m.gguf": tiny("a"), "x.gguf": model_files.projector(), "notes.txt": b"x"})
    before = ready.bytes("snapshot.json")
    add(ready, "m.gguf", "x.gguf", "notes.txt", more=f"--entrypoint m.gguf --role {role}", code=1)
    assert said in ready.err
    assert ready.bytes("snapshot.json") == before


def test_a_name_claims_nothing_that_the_engine_cannot_load(ready: Terminal) -> None:
    put(ready, **{"m.gguf": tiny("a"), "adapter_model.safetensors": b"x", "config.json": b"{}"})
    add(ready, "m.gguf", "adapter_model.safetensors", "config.json")
    assert roles(ready) == {"m.gguf": None, "adapter_model.safetensors": "other", "config.json": "config"}


def test_a_given_role_is_taken(ready: Terminal) -> None:
    put(ready, **{"m.gguf": tiny("a"), "x.gguf": model_files.projector(), "small.gguf": tiny("d")})
    add(ready, "m.gguf", "x.gguf", "small.gguf", more="--role small.gguf=draft --role x.gguf=other")
    assert roles(ready) == {"m.gguf": None, "x.gguf": "other", "small.gguf": "draft"}


def test_an_empty_file_alone_is_no_model(ready: Terminal) -> None:
    put(ready, **{"empty.gguf": b"", "m.txt": b"x"})
    add(ready, "empty.gguf", code=1)
    assert "is empty" in ready.err
    add(ready, "empty.gguf", "m.txt", more="--entrypoint empty.gguf", code=1)
    assert "an entrypoint is not empty" in ready.err
