"""
What every package needs of the file system: one translation of its errors, a lock with a deadline, deleting untrusted folders, and the
check that only root and the caller may change a file.

What a trusted path is (``check_trusted_path``):

1. Every folder from ``/`` down, every link on the way and the file itself belong to root or to the caller. A link's target is walked in
   the same way, so the folder of each link is checked too.
2. Nobody else may write to them: no group, no everybody. An access control list (POSIX) shows in the group's bits of the mode.
3. In a sticky folder that everybody may write to (``/tmp``), a folder of the caller's is safe: nobody can replace it, or make one that
   belongs to the caller. A file or a link there is not: another user can move or hard-link one of the caller's own there.
4. What is not there yet is trusted where nobody else can create it.
5. A file system that another user serves (FUSE) says what it likes of owners and modes, so its user counts as an owner.

A path that passed cannot be changed afterwards except by root and the caller, so that it may be opened by its name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from reconciler.core.errors import DiskFull, StoreError, UntrustedFile

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK_RETRY_SECONDS = 0.05
_PAGE = 4096
#: Errors of a file system that is full, limited or read-only, which concern no single file.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_IN_THE_WAY = "something else is in its place: move it away, and run again"
_NOT_YOURS = "run as the user whom the store belongs to (`ls -l`)"
#: What to do about an error of the system.
_HINTS = {
    errno.EISDIR: _IN_THE_WAY, errno.ENOTDIR: _IN_THE_WAY, errno.EEXIST: _IN_THE_WAY, errno.ELOOP: _IN_THE_WAY,
    errno.EACCES: _NOT_YOURS, errno.EPERM: _NOT_YOURS,
    errno.EROFS: "the file system is mounted read-only, perhaps after an error of the disk: look at `mount` and `dmesg`",
    errno.EIO: "the disk may be failing: look at `dmesg` and `smartctl`",
    errno.EDQUOT: "this user's quota is used up, although the disk may have space: look at `quota -s`, raise it or free some of it",
    errno.EFBIG: "the file system, or `ulimit -f`, takes no file as large: put the store on another file system, or raise the limit",
}  # fmt: skip

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 40  # as Linux has it (path_resolution(7))
_MOUNTS = Path("/proc/self/mountinfo")
_USERS = Path("/proc/self/uid_map")
#: The number that the kernel shows for owners whom a user namespace does not know (/proc/sys/kernel/overflowuid).
_UNKNOWN_USER = 65534


@contextlib.contextmanager
def translate_errors(what: str, on: Path | None = None) -> Iterator[None]:
    """
    Raise an ``OSError`` as a ``StoreError`` that says *what* was tried, why it failed, and what to do.

    *on* is a path on the file system that is concerned, for errors that name no absolute path themselves.

    Raises:
        DiskFull: the file system has no space or no inodes left, or the quota is used up.
        StoreError: any other error.
    """
    try:
        yield
    except OSError as error:
        raise store_error(what, error, on) from error


def store_error(what: str, error: OSError, on: Path | None = None) -> StoreError:
    """Return *error*, with which the system refused *what*, as an error of the store; see ``translate_errors``."""
    number = error.errno or 0
    if number == errno.ENOSPC and _lacks_inodes(on or error.filename):
        from reconciler.core.disk import INODES_HINT  # `--help` needs neither it nor the lock and the snapshot that it imports

        return DiskFull(f"cannot {what}: no inodes are left: the file system takes no more files, whatever space it has", hint=INODES_HINT)
    kind = DiskFull if number in {errno.ENOSPC, errno.EDQUOT} else StoreError
    return kind(f"cannot {what}: {error.strerror or error}", hint=_HINTS.get(number, ""))


def refusal(folder: Path) -> OSError | None:
    """Return why the file system takes no page of a new file in *folder*; None where it does. For callers whose own error does not say."""
    probe = folder / f".probe.{os.urandom(6).hex()}.tmp"
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, bytes(_PAGE))
            os.fsync(fd)
        finally:
            os.close(fd)
            probe.unlink(missing_ok=True)
    except OSError as error:
        return error
    return None


def refusal_in(text: str) -> OSError | None:
    """Return the error that *text* of another program names, where it is one of a full, limited or read-only file system."""
    for number in _REFUSALS:
        if f"[Errno {number}]" in text or os.strerror(number) in text:
            return OSError(number, os.strerror(number))
    return None


def _lacks_inodes(path: object) -> bool:
    """Whether the file system of the absolute *path* counts inodes and has none left; some, as btrfs, count none."""
    place = Path(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else Path()
    if not place.is_absolute():
        return False
    try:
        found = os.statvfs(next(folder for folder in (place, *place.parents) if folder.exists()))
    except OSError:
        return False
    return found.f_files > 0 and found.f_favail == 0


def lock(fd: int, timeout_seconds: float = 0.0) -> bool:
    """
    Take an exclusive lock on the open file *fd* (``flock(2)``), waiting for it at most *timeout_seconds*; return whether it was taken.

    The system waits without end or not at all, and an alarm to cut it short is for the main thread alone; hence the repeated tries.

    Raises:
        OSError: the file system has no locks, or none left.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOCK_RETRY_SECONDS)  # flock(2) tells nobody that a lock is free


def delete(path: Path) -> bool:
    """
    Delete what is at *path*, a folder with all that is in it; links are deleted and never followed. Return whether there was anything.

    Raises:
        OSError: something in it cannot be deleted.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        _delete_folder(path)
    else:
        path.unlink(missing_ok=True)
    return True


def _delete_folder(path: Path) -> None:
    """
    Delete the folder *path* with all that is in it, however deep.

    Not ``shutil.rmtree``: it recurses and holds a descriptor for each level, so a thousand nested folders, which an untrusted program makes
    easily, would stop every later run. Here the folders in a folder are first moved up beside it.
    """
    _make_accessible(path, None)
    top = os.open(path, _FOLDER)
    try:
        while names := _delete_files(top, top):
            for name in names:
                below = os.open(name, _FOLDER, dir_fd=top)
                try:
                    _delete_files(below, top)
                finally:
                    os.close(below)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    path.rmdir()


def _delete_files(fd: int, top: int) -> list[str]:
    """Delete what is in the folder *fd* and move its folders to *top*; return the names of those that are there already."""
    with os.scandir(fd) as found:
        entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
    names = []
    for name, is_folder in entries:
        if not is_folder:
            os.unlink(name, dir_fd=fd)
            continue
        _make_accessible(name, fd)
        if fd == top:
            names.append(name)
        else:
            os.rename(name, os.urandom(16).hex(), src_dir_fd=fd, dst_dir_fd=top)
    return names


def _make_accessible(name: str | Path, folder: int | None) -> None:
    """Give the owner access to a folder that was made without it; not by its name, which may be a link by now."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        if os.fstat(handle).st_mode & 0o700 != 0o700:
            Path(f"/proc/self/fd/{handle}").chmod(0o700)
    finally:
        os.close(handle)


def check_trusted_path(path: Path, uid: int) -> None:
    """
    Check that nobody but root and the user *uid* can change what *path* leads to, or put something there.

    Raises:
        UntrustedFile: another user can; the message names the file or folder that allows it.
        OSError: the path cannot be followed.
    """
    with contextlib.ExitStack() as opened:
        _Walk(uid, opened).follow(path)


def read_trusted(path: Path, uid: int) -> bytes:
    """
    Return the bytes of the plain file at *path*, which ``check_trusted_path`` lets pass. The file that is read is the one that was checked.

    Raises:
        UntrustedFile: another user can change it.
        OSError: it is not there, is no plain file, or cannot be read.
    """
    with contextlib.ExitStack() as opened:
        handle = _Walk(uid, opened).follow(path)
        if handle is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        with Path(f"/proc/self/fd/{handle}").open("rb") as file:  # the file that was checked, whatever has its name by now
            return file.read()


class _Walk:
    """A path that is followed from ``/`` name by name. Each step is opened without following links, and checked, before the next."""

    def __init__(self, uid: int, opened: contextlib.ExitStack) -> None:
        self._uid = uid
        self._owners = _owners(uid)
        self._opened = opened
        self._handle = -1  # of the last step, as is what follows
        self._where = "/"
        self._is_shared = False
        self._device = -1

    def follow(self, path: Path) -> int | None:
        """Return a descriptor (``O_PATH``) of what *path* leads to; None where nothing is there, and nobody else can put anything there."""
        pending = [*reversed(path.absolute().parts)]
        links = 0
        while pending:
            target = self._step(pending.pop(), is_last=not pending)
            if target is None:
                return None
            pending += reversed(Path(target).parts)
            links += bool(target)
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, "too many links", str(path))
        return self._handle

    def _step(self, name: str, *, is_last: bool) -> str | None:
        """Take one step; return the target of a link, which is to be followed from here, else an empty text; None: nothing is there."""
        where = name if name == "/" else os.path.normpath(f"{self._where.rstrip('/')}/{name}")  # no link is left in it: `..` is plain
        try:
            handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=None if name == "/" else self._handle)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENAMETOOLONG}:
                raise
            if self._is_shared:
                raise _changeable(self._where) from None
            return None
        self._opened.callback(os.close, handle)
        found = os.fstat(handle)
        self._check(found, where, is_entry=name != "/")
        if stat.S_ISLNK(found.st_mode):
            return os.readlink("", dir_fd=handle)
        if not (is_last or stat.S_ISDIR(found.st_mode)):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), where)
        self._handle, self._where, self._device = handle, where, found.st_dev
        self._is_shared = bool(found.st_mode & _OTHERS_WRITE)
        return ""

    def _check(self, found: os.stat_result, where: str, *, is_entry: bool) -> None:
        is_folder, is_link = stat.S_ISDIR(found.st_mode), stat.S_ISLNK(found.st_mode)
        if is_entry and self._is_shared and not is_folder:
            raise _changeable(self._where)
        if is_entry and found.st_dev != self._device:
            _check_mount(found.st_dev, self._owners, where)
        if found.st_uid not in self._owners:
            raise UntrustedFile(f"{where} belongs to uid {found.st_uid}, and neither to root nor to you (uid {self._uid})")
        if found.st_mode & _OTHERS_WRITE and not is_link and not (is_folder and found.st_mode & stat.S_ISVTX):
            raise _changeable(where)


def _changeable(path: str) -> UntrustedFile:
    return UntrustedFile(f"{path} may be changed by other users", hint=f"`chmod go-w {shlex.quote(path)}` takes that right from them")


def _owners(uid: int) -> set[int]:
    """Return the users who are trusted with the files of *uid*."""
    if uid == _UNKNOWN_USER and _USERS.read_text().split() != ["0", "0", "4294967295"]:
        return {0}  # in a user namespace, everybody whom it does not know has this number
    return {0, uid}


def _check_mount(device: int, owners: set[int], where: str) -> None:
    """Refuse a file system (FUSE) that another user serves; see proc(5) and mount.fuse(8)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = _MOUNTS.read_text(errors="surrogateescape")
    for line in mounts.splitlines() if " - fuse" in mounts else ():
        mount, _, system = line.partition(" - ")
        if mount.split()[2] != number or not system.startswith("fuse"):
            continue
        users = [int(option.removeprefix("user_id=")) for option in system.split()[2].split(",") if option.startswith("user_id=")]
        if not owners.issuperset(users):
            raise UntrustedFile(f"{where} is in a file system that uid {users[0]} serves, and neither root nor you")
