"""
Take out each protection of the store in turn, and see which test goes red: ``python -m tests.crash.mutations``.

A copy of the package and its tests is changed at one place, and the tests of the store run in it until the first failure. A change
that no test notices is a violation: either a test is missing, or the protection is not needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

ROOT = Path(__file__).resolve().parents[2]
TESTS = [
    "tests/unit/test_durable.py", "tests/unit/test_blobs.py", "tests/unit/test_trees.py", "tests/unit/test_writer.py",
    "tests/unit/test_layout.py", "tests/contract/test_blobs_contract.py", "tests/contract/test_trees_contract.py",
    "tests/contract/test_generations_contract.py", "tests/unit/test_generations.py", "tests/unit/test_observe.py",
    "tests/unit/test_keeper.py",
    "tests/unit/test_ledger.py", "tests/crash/test_ledger_syncs.py", "tests/unit/test_apply.py", "tests/crash/test_damage.py",
]  # fmt: skip
#: For what lies elsewhere, the tests that are about it.
ELSEWHERE = {
    "reconciler/store/unpack.py": ["tests/adversary/test_archive_leftovers.py", "tests/adversary/test_archive_attacks.py"],
    "reconciler/gguf.py": ["tests/unit/test_gguf_header.py", "tests/adversary/test_gguf_hostile.py"],
    "reconciler/fetch/staging.py": ["tests/adversary/test_fetch_leftovers.py", "tests/adversary/test_aria2_faults.py"],
    "reconciler/fetch/hasher.py": ["tests/adversary/test_verify_faults.py"],
}


class Mutation(Struct, frozen=True, kw_only=True):
    """One change of one file: the *count*-th *old* in it becomes *new*."""

    what: str
    file: str
    old: str
    new: str
    count: int = 0


def every(what: str, file: str, old: str, new: str) -> Iterator[Mutation]:
    """Yield one mutation for each place in *file* where *old*, a regular expression, is."""
    text, seen = (ROOT / file).read_text(), dict[str, int]()
    for count, found in enumerate(re.finditer(old, text)):
        function = (re.findall(r"(?m)^ *def (?!refuse)(\w+)", text[: found.start()]) or ["_FOLDER"])[-1]
        place = f"{what} in {Path(file).stem}.{function}"
        seen[place] = seen.get(place, 0) + 1
        yield Mutation(what=f"{place}, {seen[place]}" if seen[place] > 1 else place, file=file, old=old, new=new, count=count)


def once(what: str, file: str, old: str, new: str) -> Mutation:
    """Return the mutation of the one place where the text *old* is."""
    assert (ROOT / file).read_text().count(old) == 1, (file, old)
    return Mutation(what=what, file=file, old=re.escape(old), new=new)


STORE = "reconciler/store/"
DURABLE, BLOBS, TREES, MADE = (f"{STORE}{name}.py" for name in ("durable", "blobs", "trees", "generations"))
LEDGER, OBSERVE, WRITER, KEEPER = (f"{STORE}{name}.py" for name in ("ledger", "observe", "writer", "keeper"))
#: What no test can see, and why.
EQUIVALENT = {
    "follow_symlinks=False in durable.link": "nobody: link(2) of Linux follows none either; POSIX lets a system choose, and others follow",
}


def mutations() -> Iterator[Mutation]:
    """Yield every fsync, every folder's fsync, every O_NOFOLLOW, and every check of bytes or identity."""
    yield from every("fsync", DURABLE, r"os\.fsync\(fd\)", "pass")
    yield from every("fsync of the folder", DURABLE, r"(?m)^( +)sync_folder\(.*\)$", r"\1pass")
    yield from every("O_NOFOLLOW", DURABLE, r"os\.O_NOFOLLOW \| ", "")
    for file in (BLOBS, *ELSEWHERE):
        yield from every("O_NOFOLLOW", file, r"(?<!O_EXCL \| )os\.O_NOFOLLOW \| ", "")
    yield once("O_NOFOLLOW in writer.hold", WRITER, " | os.O_NOFOLLOW", "")
    yield from every("O_EXCL", DURABLE, r"os\.O_EXCL \| ", "")
    yield once("follow_symlinks=False in durable.link", DURABLE, ", follow_symlinks=False", "")
    yield once("plain files alone in durable.copy", DURABLE, "if not stat.S_ISREG(os.fstat(source).st_mode):", "if False:")
    yield once("plain files alone in durable.read", DURABLE, "if not stat.S_ISREG(os.fstat(fd).st_mode):", "if False:")
    yield from every("sync of the tree", TREES, r"durable\.sync_tree\(\w+\)", "pass")
    yield from every("fsync of the folder", LEDGER, r"durable\.sync_folder\(.*\)", "pass")
    yield from every("fsync of the folder", KEEPER, r"durable\.sync_folder\(.*\)", "pass")
    yield from every("sync of the generation", MADE, r"durable\.sync_tree\(\w+\)", "pass")
    yield once("identity in blobs.adopt: device and inode", BLOBS, "(seen.st_dev, seen.st_ino, ", "(fetched.device, fetched.inode, ")
    yield once("identity in blobs.adopt: size and time", BLOBS, "seen.st_size, seen.st_mtime_ns)\n", "fetched.size, fetched.mtime_ns)\n")
    yield once("identity in blobs.adopt: one name", BLOBS, "or seen.st_nlink != 1 ", "")
    yield once("settling in blobs._name", BLOBS, "durable.settle(fd, 0o444)", "pass")
    yield once("hash of a carried copy", BLOBS, "if self._digest(temporary, digests.parse(name)[0]) != name:", "if False:")
    yield once("hash in blobs.check", BLOBS, "self._hash(path, digests.parse(name)[0]) == name", "True")
    yield once("hash of a member's blob that is here", BLOBS, ".exists() and self.check(name)", ".exists()")
    yield once("forgetting a bad blob", BLOBS, "self._ledger.forget_blob(name)\n        return good", "pass\n        return good")
    yield once("paths of a tree", TREES, "        snapshot.check_path(path)", "        pass")
    yield once("one path twice in a tree", TREES, "if entry.path.casefold() in folded:", "if False:")
    yield once("file and folder in a tree", TREES, "if any(str(parent).casefold() in folded for", "if False and any(parent for")
    yield once("entrypoint in a tree", TREES, "if entrypoint not in {entry.path for entry in listing}:", "if False:")
    yield once("links on the way into a tree", TREES, "if _through_link(target, entry.path) or not", "if not")
    yield once("identity of a tree's file", TREES, "(found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)", "True")
    yield once("number in the index", MADE, "index.generation != number or ", "")
    yield once("path in the index", MADE, 'entry.path != path_of(entry.id) or ".." in entry.path', "False")
    yield once("link of a generation", MADE, "return os.readlink(path) == target", "return bool(os.readlink(path))")
    yield once("damage of a generation apart from a refusal", MADE, "if error.errno not in {*_GONE, errno.EINVAL}:", "if False:")
    yield once("durable ledger", LEDGER, "PRAGMA synchronous = EXTRA", "PRAGMA synchronous = OFF")
    yield once("sync of the ledger's folder", LEDGER, "PRAGMA synchronous = EXTRA", "PRAGMA synchronous = FULL")
    yield once("rollback journal of the ledger", LEDGER, "PRAGMA journal_mode = DELETE", "PRAGMA journal_mode = WAL")
    yield once("journal of the ledger on the disk", LEDGER, "PRAGMA journal_mode = DELETE", "PRAGMA journal_mode = MEMORY")
    yield once("check of the ledger", LEDGER, 'fetchone() == ("ok",)', "fetchone() is not None")
    yield once("the lock", WRITER, "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass")
    yield once("a quarantine's bound", KEEPER, "if index and (total > self._policy.quarantine_bytes", "if index and (False")


def outcome(mutation: Mutation) -> str:
    """Return the first test that goes red, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for name in ("reconciler", "tests"):
            shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", here)
        _change(here / mutation.file, mutation)
        tests = sorted(ELSEWHERE.get(mutation.file, TESTS), key=lambda test: Path(mutation.file).stem not in test)
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests],
            cwd=here, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    red = re.search(r"(?:FAILED|ERROR) \S*::(\w+)", ran.stdout)
    return red[1] if red else "" if ran.returncode == 0 else f"exit {ran.returncode}"


def _change(path: Path, mutation: Mutation) -> None:
    text = path.read_text()
    place = list(re.finditer(mutation.old, text))[mutation.count]
    new = place.expand(mutation.new) if "\\1" in mutation.new else mutation.new
    path.write_text(text[: place.start()] + new + text[place.end() :])


def main() -> None:
    """Print the table; exit 1 if a change went unnoticed."""
    chosen = [mutation for mutation in mutations() if not sys.argv[1:] or any(word in mutation.what for word in sys.argv[1:])]
    print("| taken out | the test that goes red |\n|---|---|")
    unnoticed = 0
    for mutation in chosen:
        red = outcome(mutation)
        unnoticed += not red and mutation.what not in EQUIVALENT
        print(f"| {mutation.what} | {f'`{red}`' if red else EQUIVALENT.get(mutation.what, 'NOBODY NOTICES')} |", flush=True)
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
