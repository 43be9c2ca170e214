"""
All durable changes of the file system (write, rename, link, fsync, delete) happen here.

Rules that hold here:

1. A name appears only when what it names is on the disk: write all, fsync the file, rename, fsync the folder.
2. An fsync or close that fails means that the bytes are not trusted: the kernel may have dropped them and a second fsync reports
   nothing (LWN 752063). The temporary file is deleted and the error is raised.
3. No function follows a link at the last component of a path, and deleting never leaves the folder that it was given.
4. An ``OSError`` is raised as a ``StoreError`` that names its cause (``files.translate_errors``).
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from reconciler import files
from reconciler.core.errors import UntrustedFile

_COPY = 1 << 20


def sync_folder(path: Path) -> None:
    """Make the names in *path* survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path) -> bytes:
    """
    Return the bytes of the plain file at *path*. Anything else there raises: to open a FIFO would wait without end.

    Raises:
        OSError: it is not there, is no plain file (``EISDIR``), or cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EISDIR, "not a plain file")
        return file.read()


def make_folder(path: Path, mode: int = 0o755) -> None:
    """Make the folder *path* and those missing above it, whatever the umask, and sync each name."""
    with files.translate_errors(f"make the folder {path}"):
        missing = []
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        for folder in reversed(missing):
            try:
                folder.mkdir(mode)
            except FileExistsError:
                if not folder.is_dir():  # a file, or a dangling link, and not a folder that another process just made
                    raise
            folder.chmod(mode)
            sync_folder(folder.parent)


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write *data* to *path*, durably: after a crash the file holds all of it, or what it held before."""
    with files.translate_errors(f"write {path}"):
        temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
        try:
            _write_new(temporary, data, mode)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def clear_interrupted(path: Path) -> None:
    """Delete what interrupted writes of *path* left beside it, where no run looks for it otherwise; its one writer alone calls this."""
    with files.translate_errors(f"clear what an interrupted run left beside {path}"):
        for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            temporary.unlink(missing_ok=True)


def target_of(path: Path) -> Path:
    """
    Return where ``write`` puts a file that a person may keep elsewhere: *path*, or the file that the link at *path* leads to.

    A link is followed only where nobody but root and the caller can change it or what it leads to (``files.check_trusted_path``):
    else another user could have any file of the caller's replaced.

    Raises:
        UntrustedFile: another user can.
        StoreError: the link leads to something that is no plain file, into a folder that is not there, or in a circle.
    """
    if not path.is_symlink():
        return path
    with files.translate_errors(f"write through the link {path}"):
        try:
            files.check_trusted_path(path, os.geteuid())
        except UntrustedFile as error:
            raise UntrustedFile(f"{path} is a link, and {error.message}", hint=f"{error.hint}; or name the file itself") from None
        target = path.resolve()
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {target.parent}")
        if target.exists() and not target.is_file():
            raise FileExistsError(errno.EEXIST, f"{target} is not a plain file")
    return target


def create(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write *data* to *path*, durably, where nothing may be: for what must never be replaced, such as a private key."""
    with files.translate_errors(f"create {path}"):
        try:
            _write_new(path, data, mode)
        except FileExistsError:
            raise
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _write_all(fd, data)
        sync_file(fd, mode)
    finally:
        os.close(fd)


def reserve(path: Path, size: int) -> None:
    """Have the file system allocate *size* bytes to the file *path*. Nothing is synced: it holds no data."""
    with files.translate_errors(f"reserve space in {path}"):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)


def sync_file(fd: int, mode: int) -> None:
    """Make the open file's bytes and *mode* survive a power cut, before it gets its name."""
    os.fchmod(fd, mode)
    os.fsync(fd)


def rename(old: Path, new: Path) -> None:
    """Rename *old* to *new*, durably; what was at *new* is replaced atomically."""
    with files.translate_errors(f"rename {old} to {new}"):
        old.rename(new)
        sync_folder(new.parent)
        if old.parent != new.parent:
            sync_folder(old.parent)


def move(old: Path, new: Path) -> None:
    """Rename *old* to *new*; what was at *new* is replaced atomically. It survives a power cut after ``sync_folders``, and no earlier."""
    with files.translate_errors(f"rename {old} to {new}"):
        old.rename(new)


def sync_folders(folders: Iterable[Path]) -> None:
    """Make the names in *folders* survive a power cut, each folder once, in the order of their paths."""
    for folder in sorted(folders):
        with files.translate_errors(f"sync {folder}"):
            sync_folder(folder)


def set_time(folder: Path, mtime_ns: int) -> None:
    """Give *folder* the modification time *mtime_ns*, in nanoseconds. Nothing is synced: after a crash it may have another."""
    with files.translate_errors(f"set the time of {folder}"):
        os.utime(folder, ns=(folder.stat().st_atime_ns, mtime_ns))


def new_symlink(target: str, path: Path) -> None:
    """Make a symbolic link to *target* at *path*, where nothing may be. The caller syncs the folder."""
    with files.translate_errors(f"link {path} to {target}"):
        path.symlink_to(target)


def link(old: Path, new: Path) -> None:
    """Make *new* a hard link to the file *old*; what was at *new* is replaced atomically. The caller syncs the folder."""
    with files.translate_errors(f"link {old} as {new}"):
        temporary = new.with_name(f".{os.urandom(6).hex()}.tmp")
        os.link(old, temporary, follow_symlinks=False)
        try:
            temporary.rename(new)
        finally:
            temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing (POSIX) and leaves both


def symlink(target: str, path: Path) -> None:
    """Make *path* a symbolic link to *target*, durably; a link that was there is replaced atomically."""
    with files.translate_errors(f"link {path} to {target}"):
        temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
        temporary.symlink_to(target)
        try:
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def copy(old: Path, new: Path, mode: int = 0o444) -> None:
    """Copy the plain file *old* to *new*, which must not exist, and sync it; for another file system, which no link can reach."""
    with files.translate_errors(f"copy {old} to {new}"):
        source = os.open(old, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(source).st_mode):  # a FIFO would be waited for without end
                raise OSError(errno.EINVAL, "not a plain file", str(old))
            target = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                while chunk := os.read(source, _COPY):
                    _write_all(target, chunk)
                sync_file(target, mode)
            finally:
                os.close(target)
        finally:
            os.close(source)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_tree(path: Path) -> None:
    """Make every file and folder under *path* survive a power cut, the deepest first."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk skips what it cannot read, and that would count as synced

    with files.translate_errors(f"sync {path}"):
        for folder, _, names in os.walk(path, topdown=False, onerror=refuse):
            for name in names:
                if Path(folder, name).is_symlink():
                    continue  # a link is a name and nothing else; syncing its folder keeps it
                fd = os.open(Path(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            sync_folder(Path(folder))


def delete(*paths: Path) -> None:
    """
    Delete what is at each of *paths*, a folder with all that is in it, and sync the folders above.

    Links are deleted and never followed. Missing is fine.
    """
    above = set()
    try:
        for path in paths:
            with files.translate_errors(f"delete {path}"):
                if files.delete(path):
                    above.add(path.parent)
    finally:
        sync_folders(above)
