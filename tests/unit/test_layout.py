"""The only two places in which a path is made from a digest let nothing else through."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.core.errors import StoreError
from reconciler.store.layout import Layout

LAYOUT = Layout(Path("/store"), Path("/cold"))
HEX = "ab" * 32

#: Ollama's CVE-2024-37032, and its relatives.
STRANGE = [
    "", "sha256", "sha256:", HEX, f"sha256-{HEX}", f"SHA256:{HEX}", f"sha256:{HEX.upper()}", f"sha256:{HEX}\n", f"sha256:{HEX[:-1]}",
    f"sha256:{HEX}0", f"md5:{'a' * 32}", f"sha256:../{HEX[3:]}", "sha256:" + "/" * 64, "sha256:" + "." * 64, f"../sha256:{HEX}",
    "sha256:" + "\u0661" * 64, f"sha512:{HEX}", f" sha256:{HEX}",
]  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("place", ["blob", "cold_blob", "tree"])
def test_what_is_no_digest_is_no_path(place: str, name: str) -> None:
    with pytest.raises(StoreError):
        getattr(LAYOUT, place)(name)


@pytest.mark.parametrize("name", [f"sha256:{HEX}", f"blake3:{HEX}", f"sha512:{HEX}{HEX}"])
def test_a_blob_lies_where_the_contract_says(name: str) -> None:
    algorithm, _, digits = name.partition(":")

    assert LAYOUT.blob(name) == Path(f"/store/blobs/{algorithm}/ab/{digits}")
    assert LAYOUT.cold_blob(name) == Path(f"/cold/blobs/{algorithm}/ab/{digits}")
    assert LAYOUT.tree(name) == Path(f"/store/trees/{algorithm}/ab/{digits}")


USED = [("", False), ("ledger.db", False), (".lock", False), ("blobs", True), ("trust/snapshots", True)]


@pytest.mark.parametrize(("made", "used"), USED)
def test_a_store_is_used_when_it_accepted_something(tmp_path: Path, made: str, used: bool) -> None:
    if made:
        (tmp_path / made).mkdir(parents=True)

    assert Layout(tmp_path, tmp_path).used is used
