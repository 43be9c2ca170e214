"""Every archive of the collection is refused, and nothing of it is outside the folder, whoever made it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from reconciler.core.errors import DiskFull, StoreError, UnpackRefused
from reconciler.core.node import Limits
from reconciler.unpack.extract import PlainUnpacker
from tests import archives, hostile_archives
from tests.archives import Zipped, member, pax, tar, zip_of
from tests.hostile_archives import Attack

ATTACKS = tuple(hostile_archives.attacks())
BOMBS = tuple(hostile_archives.bombs())
FLOOR = 16 << 20


def names(attacks: tuple[Attack, ...]) -> list[str]:
    return [f"{attack.kind}:{attack.name}" for attack in attacks]


class Ground:
    """A folder to unpack into, with a victim beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.into = path / "into"
        self.into.mkdir()
        (path / "victim").write_bytes(b"untouched")
        (path / "victim").chmod(0o640)
        self.source = path / "archive"

    def unpack(self, attack: Attack, limits: Limits | None = None) -> tuple[str, ...]:
        self.source.write_bytes(attack.data)
        self.before = self.outside()
        return PlainUnpacker(limits).unpack(self.source, attack.kind, self.into)

    def outside(self) -> dict[str, tuple[int, int, int, int]]:
        return {path.name: _facts(path) for path in self.path.iterdir() if path != self.into}

    def inside(self) -> dict[str, os.stat_result]:
        found = {}
        for folder, folders, files in os.walk(self.into):
            for name in (*folders, *files):
                path = Path(folder, name)
                found[str(path.relative_to(self.into))] = path.lstat()
        return found


def _facts(path: Path) -> tuple[int, int, int, int]:
    seen = path.lstat()
    return seen.st_mode, seen.st_nlink, seen.st_size, seen.st_mtime_ns


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


def test_no_two_attacks_have_one_name() -> None:
    assert len(set(names(ATTACKS))) == len(ATTACKS) > 400


@pytest.mark.parametrize("attack", ATTACKS, ids=names(ATTACKS))
def test_attack_is_refused(ground: Ground, attack: Attack) -> None:
    with pytest.raises(UnpackRefused) as refused:
        ground.unpack(attack)
    assert refused.value.message.isascii()
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 2000
    assert ground.outside() == ground.before
    for seen in ground.inside().values():
        assert stat.S_ISDIR(seen.st_mode) or (stat.S_ISREG(seen.st_mode) and seen.st_nlink == 1)
        assert not seen.st_mode & 0o7022


@pytest.mark.parametrize("bomb", BOMBS, ids=names(BOMBS))
def test_bomb_is_refused_before_it_fills_the_disk(ground: Ground, bomb: Attack) -> None:
    with pytest.raises(UnpackRefused):
        ground.unpack(bomb)
    assert sum(seen.st_size for seen in ground.inside().values() if stat.S_ISREG(seen.st_mode)) <= FLOOR + (1 << 20)


def test_a_member_that_goes_on_past_what_it_announces_is_cut_short(ground: Ground) -> None:
    lie = Zipped(b"zeros", bytes(10 << 20), method=8, local={"size": 1}, central={"size": 1})
    with pytest.raises(UnpackRefused, match="other bytes than it announces"):
        ground.unpack(Attack("lie", "zip", zip_of(lie)))
    assert sum(seen.st_size for seen in ground.inside().values()) <= 1 << 20


def test_overlapping_members_are_refused_before_one_of_them_is_written_twice(ground: Ground) -> None:
    for data in (hostile_archives.overlapping(1000), hostile_archives.quoting(100)):
        with pytest.raises(UnpackRefused, match="does not begin where the one before it ends"):
            ground.unpack(Attack("overlap", "zip", data))
        assert len(ground.inside()) <= 1
        for path in ground.into.iterdir():
            path.unlink()


@pytest.mark.parametrize("kind", archives.KINDS)
def test_a_nested_archive_stays_one_file(ground: Ground, kind: str) -> None:
    inner = archives.honest({"zeros": bytes(1 << 20)}, kind)
    assert ground.unpack(Attack("nested", kind, archives.honest({"inner": inner}, kind))) == ("inner",)
    assert (ground.into / "inner").read_bytes() == inner


@pytest.mark.parametrize("kind", archives.KINDS)
def test_an_archive_cut_at_any_place_is_refused(ground: Ground, kind: str) -> None:
    whole = archives.honest({f"folder/{index}": os.urandom(300) for index in range(6)}, kind)
    ends = {*range(0, len(whole), 512), *range(0, len(whole), 97), len(whole) - 1}
    if kind == "tar":  # up to the zeros after the end, which no reader needs
        ends = {end for end in ends if end < len(whole.rstrip(b"\0")) + 1024}
    for end in sorted(ends):
        ground.source.write_bytes(whole[:end])
        into = ground.path / f"cut-{end}"
        into.mkdir()
        with pytest.raises(UnpackRefused):
            PlainUnpacker().unpack(ground.source, kind, into)


# -- limits, as written and not as announced


def test_bytes_are_counted_as_they_come_out_and_the_limit_itself_is_allowed(ground: Ground) -> None:
    data = tar(member(b"a", bytes(512 * 10)))
    assert ground.unpack(Attack("limit", "tar", data), Limits(archive_bytes=len(data))) == ("a",)
    (ground.into / "a").unlink()
    with pytest.raises(UnpackRefused):
        ground.unpack(Attack("limit", "tar", data), Limits(archive_bytes=len(data) - 1))


def test_what_a_large_archive_may_hold_grows_with_it(ground: Ground) -> None:
    noise = os.urandom(1 << 17)
    data = zip_of(Zipped(b"noise", noise), Zipped(b"zeros", bytes(18 << 20), method=8))
    assert len(ground.unpack(Attack("ratio", "zip", data), Limits(archive_ratio=200))) == 2
    for path in ground.into.iterdir():
        path.unlink()
    with pytest.raises(UnpackRefused):
        ground.unpack(Attack("ratio", "zip", data), Limits(archive_ratio=100))


def test_folders_that_no_header_names_count_as_members(ground: Ground) -> None:
    deep = [member(b"%d/b/c/d/e" % index, b"x") for index in range(20)]
    with pytest.raises(UnpackRefused, match="more than 50 members"):
        ground.unpack(Attack("inodes", "tar", tar(*deep)), Limits(archive_members=50))


def test_headers_of_nothing_count_as_members(ground: Ground) -> None:
    comments = [pax({"comment": "x"}, b"g")] * 60
    with pytest.raises(UnpackRefused, match="more than 50 members"):
        ground.unpack(Attack("headers", "tar", tar(*comments, member(b"a", b"x"))), Limits(archive_members=50))


def test_a_directory_of_too_many_members_is_not_read(ground: Ground) -> None:
    data = zip_of(*(Zipped(b"%d" % index) for index in range(60)))
    with pytest.raises(UnpackRefused, match="lists 60 members"):
        ground.unpack(Attack("members", "zip", data), Limits(archive_members=50))
    assert not ground.inside()


def test_a_directory_with_a_name_that_is_too_long_is_not_read(ground: Ground) -> None:
    data = zip_of(Zipped(b"good", b"x"), Zipped(b"c/" * 514, b""))
    with pytest.raises(UnpackRefused, match="name that is too long"):
        ground.unpack(Attack("name", "zip", data))
    assert not ground.inside()


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar.zst", "zip"])
def test_memory_stays_flat_whatever_comes_out(tmp_path: Path, kind: str) -> None:
    ground = Ground(tmp_path)
    ground.source.write_bytes(archives.honest({"zeros": bytes(96 << 20), "more": bytes(8 << 20)}, kind))
    program = (
        "import resource, sys; from pathlib import Path; from reconciler.unpack.extract import PlainUnpacker; "
        "from reconciler.core.node import Limits; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "PlainUnpacker(Limits(archive_ratio=1 << 20)).unpack(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", program, str(ground.source), kind, str(ground.into)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 32 << 10  # KiB: a third of what comes out


@pytest.mark.parametrize("mask", [0o000, 0o077, 0o777], ids=oct)
def test_modes_are_ours_whatever_the_umask_and_the_archive_say(ground: Ground, mask: int) -> None:
    data = tar(member(b"a/", kind=b"5").replace(b"0000644", b"0007777"), member(b"b/c", b"x"))
    data = data[:148] + b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512])) + data[156:]
    before = os.umask(mask)
    try:
        ground.source.write_bytes(data)
        PlainUnpacker().unpack(ground.source, "tar", ground.into)
    finally:
        os.umask(before)
    assert {path: stat.S_IMODE(seen.st_mode) for path, seen in ground.inside().items()} == {"a": 0o755, "b": 0o755, "b/c": 0o444}


# -- the disk's own refusals


def test_a_write_that_the_system_refuses_is_no_fault_of_the_archive(ground: Ground) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path; from reconciler.unpack.extract import PlainUnpacker; "
        "from reconciler.core.errors import StoreError; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: PlainUnpacker().unpack(Path(sys.argv[1]), 'tar', Path(sys.argv[2]))\n"
        "except StoreError as error: sys.exit(7)"
    )
    ground.source.write_bytes(tar(member(b"a", bytes(4000))))
    done = subprocess.run([sys.executable, "-c", code, str(ground.source), str(ground.into)], check=False, timeout=60)
    assert done.returncode == 7


def test_no_space_left_is_called_that(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFull):
        ground.unpack(Attack("full", "tar", tar(member(b"a", b"x"))))


def test_a_link_put_into_the_folder_meanwhile_is_not_followed(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.mkdir

    def planting(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        really(path, mode, dir_fd=dir_fd)
        os.rmdir(path, dir_fd=dir_fd)
        os.symlink("..", path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", planting)
    with pytest.raises(StoreError, match="cannot unpack"):
        ground.unpack(Attack("race", "tar", tar(member(b"d/victim", b"overwritten"))))
    assert (ground.path / "victim").read_bytes() == b"untouched"


def test_a_file_put_into_the_folder_meanwhile_is_not_opened(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.mkdir

    def planting(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        really(path, mode, dir_fd=dir_fd)
        os.symlink("../../victim", f"{path}/a", dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", planting)
    with pytest.raises(UnpackRefused, match="for one"):
        ground.unpack(Attack("race", "tar", tar(member(b"d/a", b"overwritten"))))
    assert (ground.path / "victim").read_bytes() == b"untouched"
