"""Stable names: which version a model's bare name leads to, by the rule of SPEC 7 and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.snapshot import Runtime
from reconciler.core.state import ActiveModel, natural, with_current
from reconciler.store.generations import path_of
from tests.storenode import StoreNode
from tests.twins.content import Files, name_of
from tests.twins.node import MemoryNode

V1: Files = {"m": b"one"}
V2: Files = {"m": b"two"}


def entries(*models: str) -> dict[str, ActiveModel]:
    return {
        model: ActiveModel(
            id=model, tasks=("chat",), runtime=Runtime(engine="llama-cpp"), path=path_of(model), entrypoint="m", bytes=1, tree=name_of(b"t")
        )
        for model in models
    }


def current(models: list[str], chosen: dict[str, str] | None = None, **replaced_by: str) -> set[str]:
    replacements = {f"a:{old}": frozenset({f"a:{new}"}) for old, new in replaced_by.items()}
    return {model for model, entry in with_current(entries(*models), chosen or {}, replacements).items() if entry.current}


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (["a:v1"], {"a:v1"}),
        (["a:v9", "a:v10"], {"a:v10"}),
        (["a:v1.9", "a:v1.10"], {"a:v1.10"}),
        (["a:2024-12", "a:2025-01"], {"a:2025-01"}),
        (["a:v1", "a:v1-rc1"], {"a:v1-rc1"}),
        (["a:v1", "b:v1", "b:v2"], {"a:v1", "b:v2"}),
        ([], set()),
    ],
)
def test_the_highest_version_in_natural_order_has_the_name(models: list[str], expected: set[str]) -> None:
    assert current(models) == expected


def test_the_version_that_the_snapshot_chooses_has_the_name_where_it_is_active() -> None:
    assert current(["a:v1", "a:v2"], {"a": "v1"}) == {"a:v1"}
    assert current(["a:v2", "a:v3"], {"a": "v1"}) == {"a:v3"}


def test_a_version_that_an_active_one_replaces_has_not_the_name() -> None:
    assert current(["a:v1", "a:v2"], v2="v1") == {"a:v1"}
    assert current(["a:v2"], v2="v1") == {"a:v2"}


@given(st.lists(st.sampled_from(["a:v1", "a:v2", "a:v10", "b:x", "b:y"]), unique=True), st.randoms())
def test_each_name_has_one_version_whatever_the_order(models: list[str], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = [*models]
    random.shuffle(shuffled)

    assert current(models) == current(shuffled)
    assert sorted(model.partition(":")[0] for model in current(models)) == sorted({model.partition(":")[0] for model in models})


@given(st.text("v.-0123456789ab", max_size=8), st.text("v.-0123456789ab", max_size=8))
def test_natural_order_is_total(first: str, second: str) -> None:
    assert (natural(first) <= natural(second)) or (natural(second) <= natural(first))


def names_of(node: StoreNode) -> list[str]:
    return sorted(path.name for path in (node.layout.active / "names").iterdir())


# -- on a disk -------------------------------------------------------------------------------------


def test_a_name_leads_to_the_version_that_serves(tmp_path: Path) -> None:
    node = StoreNode(tmp_path)
    node.run(node.lock(node.item("a:v1", V1), node.item("b:v1", {"m": b"b"})))
    assert names_of(node) == ["a", "b"]
    assert str((node.layout.active / "names/a").readlink()) == "../models/a/v1"

    node.run(node.lock(node.item("a:v1", V1, state="retired"), node.item("a:v2", V2, replaces=["a:v1"])))

    assert (node.layout.active / "names/a/m").read_bytes() == b"two"
    assert names_of(node) == ["a"]
    assert not node.plan(node.lock(node.item("a:v2", V2))).active


def test_a_name_that_the_snapshot_moves_is_moved_without_a_download(tmp_path: Path) -> None:
    node = StoreNode(tmp_path)
    items = [node.item("a:v1", V1), node.item("a:v2", V2)]
    node.run(node.lock(*items))
    asked = len(node.internet.asked)
    lock = node.lock(*items, names={"a": "v1"})
    assert node.plan(lock).changes

    node.run(lock)

    assert (node.layout.active / "names/a/m").read_bytes() == b"one"
    assert len(node.internet.asked) == asked
    assert not node.plan(lock).changes


@pytest.mark.parametrize("harm", ["gone", "elsewhere", "more", "a folder"])
def test_a_name_that_was_changed_on_the_disk_is_drift_and_is_made_anew(tmp_path: Path, harm: str) -> None:
    node = StoreNode(tmp_path)
    lock = node.lock(node.item("a:v1", V1))
    node.run(lock)
    name = node.layout.active / "names/a"
    if harm == "more":
        name.with_name("planted").symlink_to("/etc")
    else:
        name.unlink()
        if harm == "elsewhere":
            name.symlink_to("/etc")
        elif harm == "a folder":
            name.mkdir()
    assert node.state().drift
    assert node.plan(lock).changes

    node.run(lock)

    assert (node.layout.active / "names/a/m").read_bytes() == b"one"
    assert names_of(node) == ["a"]
    assert not node.plan(lock).changes


def test_a_store_from_before_there_were_names_gets_them(tmp_path: Path) -> None:
    node = StoreNode(tmp_path)
    lock = node.lock(node.item("a:v1", V1))
    node.run(lock)
    folder = node.layout.active.resolve()
    (folder / "names/a").unlink()
    (folder / "names").rmdir()
    index = folder / "index.json"
    text = index.read_text()
    index.chmod(0o644)
    index.write_text(text.replace(',"current":true', ""))
    assert text != index.read_text()

    node.run(lock)

    assert (node.layout.active / "names/a/m").read_bytes() == b"one"


def test_the_name_goes_back_with_a_set_that_is_not_healthy() -> None:
    node = MemoryNode()
    node.run(node.lock(node.item("a:v1", V1)))
    node.hooks.verdict = lambda _: "sick"

    node.run(node.lock(node.item("a:v1", V1, state="retired"), node.item("a:v2", V2, replaces=["a:v1"])))

    assert {model: entry.current for model, entry in node.generations.active.entries.items()} == {"a:v1": True}
