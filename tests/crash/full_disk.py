"""
A disk that fills up in the middle of a run, at every point: run in a mount namespace of its own, on a small file system in memory.

    unshare --mount --map-root-user python -m tests.crash.full_disk FOLDER blocks|inodes [STEP]
    unshare --mount --map-root-user python -m tests.crash.full_disk FOLDER last-block|no-inodes|read-only
    unshare --mount python -m tests.crash.full_disk FOLDER ext4 [STEP]

Prints one JSON document: how many points were tried, how many runs were refused, and what did not hold. ``last-block`` has the whole
program on a disk whose last block somebody else took, ``no-inodes`` on one that takes no more files, ``read-only`` on one that is
remounted read-only; ``ext4`` is a real disk in a file, which finds out late that it is full.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from reconciler.core.errors import ReconcileError
from reconciler.demo.server import serving
from tests.crash.scenario import Scene, differences, untouched_end
from tests.node import Node, tiny

SIZE_KIB = 2048
INODES = 1500
#: A quarter of it is its journal, and some the inodes.
EXT4_BYTES = 16 << 20


def ballast_blocks(folder: Path, left: int) -> None:
    """Fill the file system but for *left* pages."""
    free = int(subprocess.run(["stat", "-f", "-c", "%a", folder], check=True, capture_output=True, text=True).stdout)
    (folder / "ballast").write_bytes(bytes(4096 * max(0, free - left)))


def ballast_inodes(folder: Path, left: int) -> None:
    """Use up the inodes but for *left*."""
    free = int(subprocess.run(["stat", "-f", "-c", "%d", folder], check=True, capture_output=True, text=True).stdout)
    (folder / "ballast").mkdir()
    for number in range(free - left - 1):
        (folder / "ballast" / str(number)).touch()


def ballast_disk(folder: Path, left: int) -> None:
    """Fill a disk that needs blocks for its own books, too, until it takes no more, and then free *left* pages."""
    settle(folder)
    with (folder / "ballast").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - 4096 * left))
    settle(folder)


def settle(folder: Path) -> None:
    """Have the disk carry out what it put off: what was deleted is free after that."""
    subprocess.run(["sync", "-f", folder], check=True)


FILL = {"blocks": ballast_blocks, "inodes": ballast_inodes, "ext4": ballast_disk}


def relieve(folder: Path) -> None:
    shutil.rmtree(folder / "ballast") if (folder / "ballast").is_dir() else (folder / "ballast").unlink()


def refused(scene: Scene) -> bool:
    try:
        scene.run()
    except ReconcileError:
        return True
    return False


def taken_away(folder: Path) -> list[str]:
    """Return what is wrong where the network takes a model away, and the disk has not one free block."""
    with serving() as server:
        node = Node(folder / "node", server)
        stay = node.item("stay:v1", tiny("stay"))
        node.publish(stay, node.item("gone:v1", tiny("gone")))
        found = [] if node.run("apply").code == 0 else ["the first run failed"]
        (node.folder / "published.json").write_bytes(node.network.snapshot(stay))
        ballast_blocks(folder, 0)
        for command in ("sync", "gc", "sync"):
            ran = node.run(command)
            found += [] if ran.code == 0 else [f"{command}: {ran.err}"]
            served = [model["id"] for model in node.index()["models"]]
            found += [] if served == ["stay:v1"] else [f"after {command} it serves {served}"]
        relieve(folder)
        node.run("sync")
        return found + ([] if (node.store / ".ballast").exists() else ["no room is set aside again"])


def without_inodes(folder: Path) -> list[str]:
    """Return what is wrong where a disk has space and takes hardly another file."""
    with serving() as server:
        node = Node(folder / "node", server)
        stay = node.item("stay:v1", tiny("stay"))
        more = [node.item(f"m{number:02}:v1", tiny(f"m{number}")) for number in range(20)]
        node.publish(stay)
        found = [] if node.run("apply").code == 0 else ["the first run failed"]
        node.publish(stay, *more)
        ballast_inodes(folder, 40)
        disk = json.loads(node.run("plan", "--json").out)["disk"]
        found += [] if disk["inodes_free"] == 40 and disk["inodes_needed"] > 40 else [f"the plan says {disk}"]
        ran = node.run("apply")
        found += [] if ran.code == 1 and "not enough inodes" in ran.err and "df -i" in ran.err else [f"apply: {ran.code} {ran.err}"]
        doctor = node.run("doctor", "--offline")
        found += [] if "inodes" in doctor.out else [f"doctor: {doctor.out}"]
        relieve(folder)
        ballast_inodes(folder, 0)
        ran = node.run("apply")
        found += [] if "inodes" in ran.err else [f"apply without any: {ran.code} {ran.err}"]
        relieve(folder)
        return found + blamed(node) + finished(node, 21)


def read_only(folder: Path) -> list[str]:
    """Return what is wrong where the kernel remounts the disk read-only, as it does after an error."""
    with serving() as server:
        node = Node(folder / "node", server)
        stay = node.item("stay:v1", tiny("stay"))
        node.publish(stay)
        found = [] if node.run("apply").code == 0 else ["the first run failed"]
        node.publish(stay, node.item("more:v1", tiny("more")))
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        ran = node.run("apply")
        found += [] if ran.code == 1 and "read-only" in ran.err and "dmesg" in ran.err else [f"apply: {ran.code} {ran.err}"]
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        return found + blamed(node) + finished(node, 2)


def blamed(node: Node) -> list[str]:
    """Return the models and the quarantine that bear the blame for what the disk refused."""
    failed = [model for model, state in node.states().items() if state == "failed"]
    quarantined = [path.name for path in (node.store / "quarantine").glob("*")]
    return [f"failed: {failed}"] * bool(failed) + [f"quarantined: {quarantined}"] * bool(quarantined)


def finished(node: Node, models: int) -> list[str]:
    """Return what is wrong with the next run, for which the disk has room again."""
    ran, served = node.run("apply"), len(node.index()["models"])
    return [] if ran.code == 0 and served == models else [f"the next run: {ran.code}, {served} active, {ran.err}"]


WHOLE_PROGRAM = {"last-block": taken_away, "no-inodes": without_inodes, "read-only": read_only}


def filled(folder: Path, kind: str, step: int) -> dict[str, Any]:
    """Return what was wrong with runs in which the disk fills up, at every *step*-th point."""
    expected = untouched_end(folder / "u")
    shutil.rmtree(folder / "u")
    tried, refusals, violations, left = 0, 0, list[str](), 0
    while True:
        scene = Scene(folder / "s")
        scene.prepare()
        FILL[kind](folder, left)
        ended = refused(scene)
        failed = scene.node.plan(scene.second).changes
        found = scene.faults()
        relieve(folder)
        scene.run()
        found += scene.faults()
        found += differences(scene.end(), expected)
        violations += [f"{left} {kind} left: {text}" for text in found]
        shutil.rmtree(folder / "s")
        tried, refusals, left = tried + 1, refusals + ended, left + step
        if not ended and not failed:
            return {"tried": tried, "refused": refusals, "violations": violations}


def mount(folder: Path, kind: str) -> None:
    """Put a small file system at *folder*."""
    if kind == "ext4":
        image = folder.with_name(f"{folder.name}.img")
        image.write_bytes(b"")
        os.truncate(image, EXT4_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", "-N", "3000", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True)
        return
    size, inodes = {"last-block": (65536, 0), "read-only": (65536, 0), "no-inodes": (65536, INODES)}.get(kind, (SIZE_KIB, INODES))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k,nr_inodes={inodes}", "tmpfs", folder], check=True)


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    mount(folder, kind)
    if kind in WHOLE_PROGRAM:
        found = {"tried": 1, "violations": WHOLE_PROGRAM[kind](folder)}
    else:
        found = filled(folder, kind, int((sys.argv[3:] or ["1"])[0]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
