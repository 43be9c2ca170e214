"""Torrents of a snapshot's files, as the network's operator makes them; real aria2c reads them."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reconciler.commands import schemas
from reconciler.core import lock, snapshot, swarm, trust
from reconciler.fetch import aria2_daemon
from reconciler.publish import differences, lint, snapshots
from tests.functional.test_operator import Terminal, accepted, ready, terminal

__all__ = ["ready", "terminal"]

TRACKER = "udp://tracker.example.org:6969/announce"
ADD = f"snapshot swarm add snapshot.json --files . --least 1B --tracker {TRACKER} --url https://models.example.org/t/{{algorithm}}/{{hex}}"


def signed(ready: Terminal) -> None:
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key --no-lint --yes")


def torrents(ready: Terminal) -> dict[str, swarm.Torrent]:
    found = snapshots.open_(ready.bytes("snapshot.json")).swarm
    assert found
    return found.torrents


def test_a_torrent_is_made_signed_and_written_for_each_large_file(ready: Terminal) -> None:
    ready(ADD)
    digits = hashlib.sha256(ready.bytes("tiny.gguf")).hexdigest()
    ((name, entry),) = torrents(ready).items()
    assert name == f"sha256:{digits}"
    data = ready.bytes(f"torrents/sha256/{digits}.torrent")
    assert entry.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert entry.size == len(data)
    assert entry.urls == (f"https://models.example.org/t/sha256/{digits}",)
    assert ready.bytes(f"torrents/sha256/{entry.digest[7:]}") == data
    assert swarm.matches(data, digits, len(ready.bytes("tiny.gguf")))
    signed(ready)
    accepted(ready)


def test_aria2_reads_the_torrent_as_private_and_without_trackers(ready: Terminal) -> None:
    ready(ADD)
    ((name, entry),) = torrents(ready).items()
    path = ready.folder / "torrents" / "sha256" / f"{name[7:]}.torrent"
    shown = subprocess.run([aria2_daemon.find(), "-S", str(path)], check=True, capture_output=True, text=True, timeout=30).stdout
    assert entry.info_hash in shown
    assert f"./{name[7:]}" in shown
    assert "Announce:\nInfo Hash" in shown
    assert b"7:privatei1e" in path.read_bytes()


def test_two_operators_make_the_same_torrent(ready: Terminal) -> None:
    ready(ADD)
    before = torrents(ready)
    ready("snapshot swarm remove snapshot.json")
    (ready.folder / "copy").mkdir()
    (ready.folder / "tiny.gguf").rename(ready.folder / "copy" / "other-name")
    ready(ADD)
    assert torrents(ready) == before


def test_a_file_with_other_bytes_makes_no_torrent(ready: Terminal) -> None:
    path = ready.folder / "tiny.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    ready(ADD, code=1)
    assert "no file in the folders given is sha256:" in ready.err
    assert not (ready.folder / "torrents").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (ADD.replace(TRACKER, "ftp://tracker.example.org"), "--tracker:"),
        (ADD.replace(TRACKER, "udp://tracker.example.org/announce"), "names its port"),
        (ADD.replace(f"--tracker {TRACKER}", ""), "no tracker is named"),
        (ADD.replace("{hex}", "x"), "--url:"),
        (f"{ADD} other:v1", "lists no model"),
        ("snapshot swarm whitelist snapshot.json", "has no torrents"),
    ],
)
def test_what_nodes_could_not_use_is_refused(ready: Terminal, line: str, said: str) -> None:
    before = ready.bytes("snapshot.json")
    ready(line, code=1)
    assert said in ready.err
    assert ready.bytes("snapshot.json") == before


def test_a_later_add_keeps_trackers_and_address_and_drops_what_is_no_longer_listed(ready: Terminal) -> None:
    ready(ADD)
    (old,) = torrents(ready)
    (ready.folder / "next.gguf").write_bytes(ready.bytes("tiny.gguf") + bytes(32))
    ready("snapshot add snapshot.json tiny:v2 next.gguf --url https://models.example.org/next.gguf --beside --no-inspect", code=64)
    document = snapshots.edit(
        ready.bytes("snapshot.json"), lambda found: _with_other_content(found, ready.bytes("next.gguf")), now=_now()
    ).data
    (ready.folder / "snapshot.json").write_bytes(document)
    assert any(old in one.text for one in lint.lint(snapshots.open_(document)))
    ready("snapshot swarm add snapshot.json --files . --least 1B")
    ((name, entry),) = torrents(ready).items()
    assert name != old
    assert entry.urls == (f"https://models.example.org/t/sha256/{name[7:]}",)


def _with_other_content(found: snapshot.Snapshot, data: bytes) -> snapshot.Snapshot:
    replace = msgspec.structs.replace
    (model,) = found.models
    other = replace(model.artifacts[0], digest=f"sha256:{hashlib.sha256(data).hexdigest()}", size=len(data))
    return replace(found, models=(replace(model, version="v2", artifacts=(other,)),))


def _now() -> Any:
    from reconciler.commands.context import wall_clock

    return wall_clock()


def test_the_whitelist_has_each_info_hash_on_a_line(ready: Terminal) -> None:
    ready(ADD)
    ((_, entry),) = torrents(ready).items()
    assert ready("snapshot swarm whitelist snapshot.json") == f"{entry.info_hash}\n"
    ready("snapshot swarm whitelist snapshot.json --out white")
    assert ready.bytes("white") == f"{entry.info_hash}\n".encode()


def test_people_see_the_swarm_before_they_sign(ready: Terminal) -> None:
    before = ready.bytes("snapshot.json")
    ready(ADD)
    after = ready.bytes("snapshot.json")
    shown = ready("snapshot inspect --full snapshot.json")
    assert TRACKER in shown
    assert torrents(ready).popitem()[1].info_hash in shown
    assert "ignore it" not in shown
    there, back = differences.diff(before, after), differences.diff(after, before)
    assert any(f"fetch 1 file from each other, through {TRACKER}" in one for one in there.summary)
    assert any("tracker.example.org" in one and "did not ask before" in one for one in there.summary)
    assert "nodes no longer fetch from each other" in back.summary


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trackers": ()}, "no tracker"),
        ({"torrents": {f"sha256:{'0' * 64}": {"url": "https://x.example.org/t?X-Amz-Signature=1"}}}, "a signature or a secret"),
    ],
)
def test_lint_names_what_is_probably_wrong(ready: Terminal, change: dict[str, Any], said: str) -> None:
    ready(ADD)
    found = snapshots.open_(ready.bytes("snapshot.json"))
    assert found.swarm
    if "torrents" in change:
        (entry,) = found.swarm.torrents.values()
        change = {"torrents": {name: msgspec.structs.replace(entry, urls=(one["url"],)) for name, one in change["torrents"].items()}}
    changed = msgspec.structs.replace(found, swarm=msgspec.structs.replace(found.swarm, **change))
    assert any(said in one.text for one in lint.lint(changed))
    assert not any(said in one.text for one in lint.lint(found))


def test_the_lock_is_the_same_with_and_without_a_swarm(ready: Terminal) -> None:
    """What a node does with peers is its own affair: the lock says what must be there, so nodes that ignore peers hold the same set."""
    found = snapshots.open_(ready.bytes("snapshot.json"))
    ready(ADD)
    added = snapshots.open_(ready.bytes("snapshot.json"))

    def compiled(one: snapshot.Snapshot) -> bytes:
        same = msgspec.structs.replace(one, issued_at=found.issued_at, expires_at=found.expires_at, version=1)
        return lock.encode(lock.compile(trust.Verified(snapshot=same, digest=f"sha256:{'0' * 64}", root_version=1, role="snapshot")))

    assert added.swarm
    assert compiled(found) == compiled(added)


def test_a_snapshot_whose_swarm_has_no_address_is_refused_by_its_place(ready: Terminal) -> None:
    ready(ADD)
    payload = msgspec.json.decode(msgspec.json.encode(snapshots.open_(ready.bytes("snapshot.json"))))
    payload["swarm"]["trackers"] = ["javascript:alert(1)"]
    with pytest.raises(Exception, match=r"swarm\.trackers\[0\]"):
        snapshot.decode(msgspec.json.encode(payload))


def test_the_schema_knows_the_swarm() -> None:
    assert b'"swarm"' in schemas.schema(schemas.DOCUMENTS["snapshot"])


def test_a_torrent_of_another_shape_does_not_match() -> None:
    digits, data = "ab" * 32, bytes(600_000)
    made = swarm.torrent(digits, len(data), swarm.pieces([data], swarm.piece_length(len(data))))
    assert swarm.matches(made, digits, len(data))
    assert swarm.info_hash(digits, len(data), swarm.pieces([data], swarm.LEAST_PIECE)) == hashlib.sha1(made[7:-1]).hexdigest()
    for other in (
        made.replace(b"7:privatei1e", b"7:privatei0e"),
        made.replace(digits.encode(), b"../x" + digits[4:].encode()),
        b"d8:announce20:http://a.example.org" + made[1:],
        made + b"x",
        made[:-1],
        b"",
    ):
        assert not swarm.matches(other, digits, len(data))
    assert not swarm.matches(made, digits, len(data) + swarm.LEAST_PIECE)


@pytest.mark.parametrize("sizes", [[0, 1, 262_143, 262_144, 5], [524_288], [262_144, 1], [1]])
def test_pieces_do_not_depend_on_how_the_bytes_come(sizes: list[int]) -> None:
    data = bytes(index % 251 for index in range(sum(sizes)))
    offsets = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    chunks = [data[start:end] for start, end in itertools.pairwise(offsets)]
    naive = b"".join(hashlib.sha1(data[at : at + swarm.LEAST_PIECE]).digest() for at in range(0, len(data), swarm.LEAST_PIECE))
    assert swarm.pieces(chunks, swarm.LEAST_PIECE) == naive


def test_nothing_is_left_where_torrents_go_when_the_snapshot_is_missing(terminal: Terminal, tmp_path: Path) -> None:
    terminal("snapshot swarm add nothing.json --files .", code=1)
    assert not list(tmp_path.rglob("torrents"))
