"""What a file is for, by its header and its name; and which split of a model is missing, misnamed or one too many."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from reconciler.core import lifecycle, lock, roles, snapshot, vocabulary
from reconciler.core.errors import BadEnvelope
from reconciler.core.gguf import GgufFacts
from tests.network import Document, Network


def header(**changes: Any) -> GgufFacts:
    facts: dict[str, Any] = {
        "version": 3, "architecture": "llama", "name": "", "context_length": 0, "embedding_length": 0, "block_count": 0, "quantisation": "",
        "parameters": 0, "chat_template": False, "embedding": False, "tensor_bytes": 1,
    }  # fmt: skip
    return GgufFacts(**facts | changes)


MODEL, PROJECTOR, ADAPTER = header(), header(architecture="clip"), header(kind="adapter")


def part(number: int, count: int) -> GgufFacts:
    return header(part=number, parts=count, architecture="llama" if number == 1 else "")


@pytest.mark.parametrize(
    ("path", "facts", "role"),
    [
        ("m.gguf", MODEL, "model"),
        ("mmproj-m.gguf", PROJECTOR, "mmproj"),
        ("m.gguf", header(kind="mmproj"), "mmproj"),
        ("m.gguf", ADAPTER, "lora"),
        ("m.gguf", header(kind="imatrix"), "other"),
        ("m.gguf", header(architecture="controlvector"), "other"),
        ("m-00001-of-00003.gguf", part(1, 3), "model"),
        ("m-00002-of-00003.gguf", part(2, 3), "split"),
        ("small-draft.gguf", MODEL, "draft"),
        ("draft/Tiny-DRAFT-Q8_0.gguf", MODEL, "draft"),
        ("overdraft.gguf", MODEL, "model"),
        ("mmproj-draft.gguf", PROJECTOR, "mmproj"),
        ("model.safetensors", None, "model"),
        ("model-00002-of-00002.safetensors", None, "split"),
        ("adapter_model.safetensors", None, "lora"),
        ("tokenizer.json", None, "tokenizer"),
        ("tokenizer_config.json", None, "tokenizer"),
        ("sub/vocab.txt", None, "tokenizer"),
        ("special_tokens_map.json", None, "tokenizer"),
        ("config.json", None, "config"),
        ("1_Pooling/config.json", None, "config"),
        ("config_sentence_transformers.json", None, "config"),
        ("generation_config.json", None, "config"),
        ("model.safetensors.index.json", None, "config"),
        ("modules.json", None, "config"),
        ("chat_template.jinja", None, "template"),
        ("chat_template.json", None, "template"),
        ("LICENSE", None, "licence"),
        ("LICENCE.txt", None, "licence"),
        ("COPYING", None, "licence"),
        ("README.md", None, "other"),
        ("unlicensed.bin", None, "model"),
        ("data.parquet", None, "other"),
    ],
)
def test_a_role_is_told_by_the_header_and_else_by_the_name(path: str, facts: GgufFacts | None, role: str) -> None:
    assert roles.infer(path, facts) == role
    assert role in vocabulary.ROLES


@pytest.mark.parametrize(
    ("role", "facts"),
    [
        ("model", PROJECTOR), ("lora", PROJECTOR), ("draft", PROJECTOR), ("tokenizer", PROJECTOR),
        ("model", ADAPTER), ("mmproj", ADAPTER),
        ("mmproj", MODEL), ("lora", MODEL), ("split", MODEL), ("licence", MODEL), ("tokenizer", MODEL),
        ("model", part(2, 3)), ("draft", part(2, 3)),
    ],
)  # fmt: skip
def test_a_role_that_contradicts_the_header_is_told(role: str, facts: GgufFacts) -> None:
    assert roles.contradiction(role, facts).startswith(f"its role is {role!r}, and by its header it is ")


@pytest.mark.parametrize(
    ("role", "facts"),
    [
        ("model", MODEL), ("draft", MODEL), ("other", MODEL), ("mmproj", PROJECTOR), ("other", PROJECTOR), ("lora", ADAPTER),
        ("model", part(1, 3)), ("split", part(1, 3)), ("split", part(3, 3)), ("tokenizer", header(tensor_bytes=0)),
    ],
)  # fmt: skip
def test_a_role_that_the_header_permits_is_no_contradiction(role: str, facts: GgufFacts) -> None:
    assert roles.contradiction(role, facts) == ""


# -- splits ------------------------------------------------------------------------------------------

WHOLE = {f"m-{number:05}-of-00003.gguf": part(number, 3) for number in (1, 2, 3)}
FIRST = "m-00001-of-00003.gguf"


def without(path: str) -> dict[str, GgufFacts | None]:
    return {other: facts for other, facts in WHOLE.items() if other != path}


def test_a_whole_split_model_has_no_fault_and_is_opened_as_one() -> None:
    assert roles.split_fault(WHOLE | {"config.json": None}, FIRST) == ""
    assert roles.split_set(FIRST, [*WHOLE, "config.json"]) == tuple(sorted(WHOLE))
    assert roles.split_set("m.gguf", ["m.gguf", *WHOLE]) == ("m.gguf",)
    assert roles.split_fault({"m-00001-of-00001.gguf": header()}, "m-00001-of-00001.gguf") == ""


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_missing_split_is_named_with_or_without_headers(number: int) -> None:
    gone = f"m-{number:05}-of-00003.gguf"
    for files in (without(gone), dict.fromkeys(without(gone))):
        fault = roles.split_fault(files, min(files))
        assert fault.startswith(f"split {number} of 3 is missing: there is no {gone!r}")


def test_a_renamed_split_is_named_with_the_name_that_engines_look_for() -> None:
    files = without("m-00002-of-00003.gguf") | {"second.gguf": part(2, 3)}
    assert roles.split_fault(files, FIRST) == (
        "split 2 of 3 is missing: 'second.gguf' is that split by its header, and engines look for 'm-00002-of-00003.gguf'"
    )


def test_two_splits_with_each_others_names_are_named() -> None:
    files = WHOLE | {"m-00002-of-00003.gguf": part(3, 3), "m-00003-of-00003.gguf": part(2, 3)}
    assert roles.split_fault(files, FIRST) == (
        "'m-00002-of-00003.gguf' is one split too many: by its header it is split 3 of 3, and 'm-00003-of-00003.gguf' is that one"
    )


@pytest.mark.parametrize(
    ("path", "facts", "said"),
    [
        ("m-00004-of-00003.gguf", None, "'m-00004-of-00003.gguf' is one split too many: there are 3"),
        ("m-00000-of-00003.gguf", None, "'m-00000-of-00003.gguf' is one split too many: there are 3"),
        ("copy.gguf", part(3, 3), "'copy.gguf' is one split too many: by its header it is split 3 of 3"),
        ("m-00002-of-00005.gguf", part(2, 5), "split 1 of 5 is missing"),
        ("n-00001-of-00002.gguf", MODEL, "'n-00001-of-00002.gguf' is named as a split, and its header says that it is whole"),
    ],
)
def test_an_extra_split_is_named(path: str, facts: GgufFacts | None, said: str) -> None:
    assert said in roles.split_fault(WHOLE | {path: facts}, FIRST)


def test_an_engine_is_given_the_first_split() -> None:
    assert "engines begin with the first split" in roles.split_fault(WHOLE, "m-00002-of-00003.gguf")


def test_a_name_that_claims_many_splits_costs_nothing() -> None:
    assert roles.split_fault({"m-00001-of-99999.gguf": None}, "m-00001-of-99999.gguf").startswith("split 2 of 99999 is missing")


# -- in a snapshot and its lock ------------------------------------------------------------------------


def locked(**roles: str) -> lock.LockedModel:
    """A model of two files and an archive, with the *roles* that are given."""
    item: Document = Network().model("a:v1", b"x", path="a.gguf")
    for name in ("b.gguf", "c.tar"):
        item["artifacts"].append(item["artifacts"][0] | {"path": name, "unpack": "tar" if name == "c.tar" else None})
    for one in item["artifacts"]:
        if role := roles.get(one["path"][0]):
            one["role"] = role
    document = Network().snapshot_document(item)
    return lock.compile_model(snapshot.decode(msgspec.json.encode(document)).models[0])


def test_a_role_changes_the_test_job_and_not_the_tree() -> None:
    plain, draft, other = locked(), locked(b="draft"), locked(b="other")
    assert plain.recipe == draft.recipe
    assert len({lifecycle.smoke_digest(one) for one in (plain, draft, other)}) == 3


def test_the_role_of_an_archive_is_its_entrypoints() -> None:
    assert locked(c="model").file_roles == {"a.gguf": "model"}
    assert locked(a="split", c="model", b="lora").file_roles == {"a.gguf": "split", "b.gguf": "lora"}
    assert locked().file_roles == {}


@pytest.mark.parametrize(("path", "fine"), [("a.gguf", False), ("b.gguf", True), ("c.tar", False)])
def test_a_file_beside_the_entrypoint_may_be_empty(path: str, fine: bool) -> None:
    item: Document = Network().model("a:v1", b"x", path="a.gguf")
    for name in ("b.gguf", "c.tar"):
        digits = f"sha256:{name.encode().hex():0>64}"
        item["artifacts"].append(item["artifacts"][0] | {"path": name, "digest": digits, "unpack": "tar" if name == "c.tar" else None})
    next(one for one in item["artifacts"] if one["path"] == path)["size"] = 0
    payload = msgspec.json.encode(Network().snapshot_document(item))
    if fine:
        assert snapshot.decode(payload).models[0].artifacts[1].size == 0
    else:
        with pytest.raises(BadEnvelope, match="is not empty"):
            snapshot.decode(payload)
