"""
A disk that fills up in the middle of a run, at every point: run in a mount namespace of its own, on a small file system in memory.

    unshare --mount --map-root-user python -m tests.crash.full_disk FOLDER blocks|inodes [STEP]

Prints one JSON document: how many points were tried, how many runs were refused, and what did not hold.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from reconciler.errors import ReconcileError
from tests.crash.scenario import Scene

SIZE_KIB = 2048
INODES = 1500


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


FILL = {"blocks": ballast_blocks, "inodes": ballast_inodes}


def relieve(folder: Path) -> None:
    shutil.rmtree(folder / "ballast") if (folder / "ballast").is_dir() else (folder / "ballast").unlink()


def refused(scene: Scene) -> bool:
    try:
        scene.run()
    except ReconcileError:
        return True
    return False


def main() -> None:
    folder, kind, step = Path(sys.argv[1]), sys.argv[2], int((sys.argv[3:] or ["1"])[0])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_KIB}k,nr_inodes={INODES}", "tmpfs", folder], check=True)
    untouched = Scene(folder / "u")
    untouched.prepare()
    untouched.run()
    end = untouched.end()
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
        found += [f"{key} is {scene.end()[key]}, expected {end[key]}" for key in end if scene.end()[key] != end[key]]
        violations += [f"{left} {kind} left: {text}" for text in found]
        shutil.rmtree(folder / "s")
        tried, refusals, left = tried + 1, refusals + ended, left + step
        if not ended and not failed:
            break
    print(json.dumps({"tried": tried, "refused": refusals, "violations": violations}))


if __name__ == "__main__":
    main()
