"""
Files that are found and not named: another user who may write one of them, or a folder above it, decides nothing.

Each attack is made by another user of the machine against root and against a service user. Where the tests do not run as root, they
cannot give a file away: the other user's files are then ours, with an owner that the engine is shown instead (`Site.give`).
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reconciler import files, settings_file
from reconciler.core.errors import UntrustedFile
from reconciler.demo.server import Server
from tests.network import Network
from tests.node import Node, Ran, run, tiny

IS_ROOT = os.geteuid() == 0
OTHER = 65533
SERVICE = 1234
CALLERS = [0, SERVICE] if IS_ROOT else [os.geteuid()]
SETTINGS = '[network]\nsnapshot = "published.json"\n'


@functools.cache
def documents() -> dict[str, bytes]:
    """Return a node's signed documents and its lock; and import all that a plan needs, which a service user may not be able to read."""
    network = Network()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "reconcile.toml").write_text(SETTINGS)
        (folder / "root.json").write_bytes(network.root())
        (folder / "published.json").write_bytes(network.snapshot(network.model("a:v1", b"bytes")))
        for command in ("lock", "plan"):
            assert run(command, "--config", f"{folder}/reconcile.toml").code == 0
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Site:
    """A folder below the system's folder for temporary files, which everybody may write to; a node's folder and one below it in it."""

    def __init__(self, top: Path, caller: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top = top
        self.caller = caller
        self.node = top / "node"
        self.work = self.node / "work"
        self.settings = self.node / "reconcile.toml"
        self._owners: dict[tuple[int, int], int] = {}
        self._monkeypatch = monkeypatch
        self.work.mkdir(parents=True)
        self.write("")
        for name, data in documents().items():
            (self.node / name).write_bytes(data)
        for path in (top, *top.rglob("*")):
            self.give(path, caller)

    def write(self, extra: str) -> None:
        """Write the settings."""
        self.settings.write_text(SETTINGS + extra)

    def give(self, path: Path, uid: int) -> None:
        """Make *path* the user *uid*'s."""
        if IS_ROOT:
            os.chown(path, uid, uid, follow_symlinks=False)
            return
        if not self._owners:
            self._monkeypatch.setattr(os, "fstat", _with_owners(os.fstat, self._owners))
        found = path.lstat()
        self._owners[found.st_dev, found.st_ino] = uid

    def run(self, *arguments: str, folder: Path | None = None) -> Ran:
        """Run one command as the caller, below the node's folder or in *folder*."""
        here = Path.cwd()
        if self.caller != os.geteuid():
            return _in_child(self.caller, folder or self.work, arguments)
        os.chdir(folder or self.work)
        try:
            return run(*arguments)
        finally:
            os.chdir(here)


def _with_owners(fstat: Callable[[int], os.stat_result], owners: dict[tuple[int, int], int]) -> Callable[[int], os.stat_result]:
    def pretended(fd: int) -> os.stat_result:
        found = fstat(fd)
        uid = owners.get((found.st_dev, found.st_ino))
        return found if uid is None else os.stat_result((*found[:4], uid, *found[5:]))

    return pretended


def _in_child(uid: int, folder: Path, arguments: tuple[str, ...]) -> Ran:
    """Run one command as the user *uid*, in a child of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.chdir(folder)
            ran = run(*arguments)
            os.write(writing, json.dumps([ran.code, ran.out, ran.err]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        data = told.read()
    os.waitpid(child, 0)
    return Ran(*json.loads(data))


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder as ``/tmp`` is: everybody may write to it, and take away what is their own."""
    folder = Path(tempfile.mkdtemp(prefix="found-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=CALLERS, ids=lambda uid: "root" if uid == 0 else "service")
def site(request: pytest.FixtureRequest, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A node of the caller, in a folder of the caller's in a folder that everybody may write to."""
    monkeypatch.delenv("RECONCILE_CONFIG", raising=False)
    return Site(shared / "top", request.param, monkeypatch)


def refused(ran: Ran, about: str) -> None:
    """Check that the command says what it does not trust, and what to type."""
    assert ran.code == 1, ran
    assert ran.err.startswith("error[untrusted-file]: "), ran.err
    assert about in ran.err
    assert "--config" in ran.err.partition("hint: ")[2]


# -- the attack as it was seen ---------------------------------------------------------------------


def test_settings_that_another_user_put_in_a_folder_above_run_no_hook(
    shared: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RECONCILE_CONFIG", raising=False)
    proof = shared / "proof"
    node = Node(shared / "node", server, extra=f'\n[hooks]\nactivated = ["/usr/bin/touch", "{proof}"]\n')
    node.publish(node.item("a:v1", tiny("a")))
    site = Site(shared / "top", os.geteuid(), monkeypatch)
    work = node.folder / "work"
    work.mkdir()
    site.give(node.folder / "reconcile.toml", OTHER)

    ran = site.run("apply", "--yes", folder=work)

    assert not proof.exists()
    refused(ran, f"{node.folder}/reconcile.toml")


# -- the settings, and what is above them ----------------------------------------------------------


def test_the_callers_own_settings_are_found(site: Site) -> None:
    assert site.run("plan").code == 0


def test_settings_of_another_user_are_refused(site: Site) -> None:
    site.give(site.settings, OTHER)

    refused(site.run("plan"), f"{site.settings} belongs to uid {OTHER}")


@pytest.mark.parametrize("which", ["node", "top"])
def test_settings_in_a_folder_of_another_user_are_refused(site: Site, which: str) -> None:
    folder: Path = getattr(site, which)
    site.give(folder, OTHER)

    refused(site.run("plan"), f"{folder} belongs to uid {OTHER}")


@pytest.mark.parametrize("mode", [0o020, 0o002], ids=["group", "everybody"])
@pytest.mark.parametrize("which", ["settings", "node", "top"])
def test_settings_that_others_may_write_or_replace_are_refused(site: Site, which: str, mode: int) -> None:
    path: Path = getattr(site, which)
    path.chmod(path.stat().st_mode | mode)

    ran = site.run("plan")

    refused(ran, f"{path} may be changed by ")
    assert f"chmod go-w {path}" in ran.err


def test_a_sticky_folder_between_keeps_what_is_the_callers(site: Site) -> None:
    site.top.chmod(0o1777)

    assert site.run("plan").code == 0


def test_settings_moved_or_hard_linked_into_a_sticky_folder_are_refused(site: Site) -> None:
    """Another user can put there what is the caller's: an old file, an example, a download."""
    site.node.chmod(0o1777)

    refused(site.run("plan"), f"{site.node} may be changed by ")


def test_a_user_cannot_use_the_callers_files_by_a_link(site: Site) -> None:
    kept = site.settings.rename(site.top / "old.toml")
    site.settings.symlink_to(kept)
    site.give(site.settings, OTHER)

    refused(site.run("plan"), f"{site.settings} belongs to uid {OTHER}")


def test_a_link_to_settings_in_a_folder_of_another_user_is_refused(site: Site) -> None:
    away = site.top / "away"
    away.mkdir()
    site.give(away, OTHER)
    site.settings.rename(away / "reconcile.toml")
    site.settings.symlink_to("../away/reconcile.toml")
    site.give(site.settings, site.caller)

    refused(site.run("plan"), f"{away} belongs to uid {OTHER}")


def test_each_link_on_the_way_is_checked_with_its_own_folder(site: Site) -> None:
    """settings -> away/link -> kept: the file and its folder are the caller's, and the link between is not."""
    away = site.top / "away"
    away.mkdir()
    kept = site.settings.rename(site.top / "kept.toml")
    (away / "link").symlink_to(kept)
    site.settings.symlink_to(away / "link")
    for path in (away, away / "link", site.settings):
        site.give(path, site.caller)
    assert site.run("plan").code == 0
    away.chmod(0o1777)

    refused(site.run("plan"), f"{away} may be changed by ")


def test_links_in_a_circle_are_refused(site: Site) -> None:
    (site.node / "root.json").unlink()
    (site.node / "root.json").symlink_to("root.json")
    site.give(site.node / "root.json", site.caller)

    ran = site.run("plan")

    assert ran.code == 1
    assert ran.err.startswith("error[bad-settings]: [network] root: ")
    assert "too many links" in ran.err


def test_a_list_of_users_who_may_write_is_seen(site: Site) -> None:
    """Of a POSIX access control list the group's bits in the mode say the most that anybody in it may do."""
    entry = struct.Struct("<HHI")
    anybody = 0xFFFFFFFF
    rules = [(1, 6, anybody), (2, 6, OTHER), (4, 4, anybody), (0x10, 6, anybody), (0x20, 4, anybody)]
    try:
        os.setxattr(site.settings, "system.posix_acl_access", struct.pack("<I", 2) + b"".join(entry.pack(*rule) for rule in rules))
    except OSError:  # a file system without such lists: its mode says all
        site.settings.chmod(0o664)

    refused(site.run("plan"), f"{site.settings} may be changed by ")


def test_roots_settings_are_good_for_everybody(site: Site) -> None:
    for path in (site.top, *site.top.rglob("*")):
        site.give(path, 0)

    assert site.run("plan").code == 0


def test_root_in_a_users_folder_does_not_do_what_the_user_says(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECONCILE_CONFIG", raising=False)
    site = Site(shared / "top", SERVICE, monkeypatch)
    site.caller = os.geteuid()

    refused(site.run("plan"), f"belongs to uid {SERVICE}")


# -- what the settings name ------------------------------------------------------------------------


FILES = ("ca.pem", "netrc", "hook", "script", "server", "page.html", "report.key", "token", "models.ini")
FOLDERS = ("store", "cold", "bound", "libraries", "more-libraries", "compiled")
NAMED = ["root.json", "published.json", "models.lock", "snapshot.json", *FILES, *FOLDERS]
MORE = """
[store]
path = "store"
archive = "cold"

[download]
ca_file = "ca.pem"
netrc = "netrc"

[hooks]
activated = ["./hook"]
healthy = ["sh", "script"]

[runtime.openai]
argv = ["{node}/server", "{{model}}", "{{port}}"]
bind = ["bound"]
library_path = ["libraries"]

[runtime.llama-cpp]
library_path = ["more-libraries"]
cuda_cache = "compiled"

[download.credentials."models.example.org"]
token_file = "token"

[agent]
page = "page.html"

[report]
key = "report.key"

[[serve]]
kind = "llama-server"
name = "main"
path = "models.ini"
"""


def with_more(site: Site) -> None:
    site.write(MORE.format(node=site.node))
    for name in FILES:
        (site.node / name).touch(0o700)
        site.give(site.node / name, site.caller)
    for name in FOLDERS:
        (site.node / name).mkdir(exist_ok=True)
        site.give(site.node / name, site.caller)


def test_what_the_settings_name_may_be_the_callers(site: Site) -> None:
    with_more(site)

    assert site.run("plan").code == 0


@pytest.mark.parametrize("name", NAMED)
def test_what_the_settings_name_may_not_be_another_users(site: Site, name: str) -> None:
    with_more(site)
    site.give(site.node / name, OTHER)

    refused(site.run("plan"), f"{site.node / name} belongs to uid {OTHER}")


@pytest.mark.parametrize("name", NAMED)
def test_what_the_settings_name_may_not_be_linked_to_another_users_folder(site: Site, name: str) -> None:
    with_more(site)
    away = site.top / "away"
    away.mkdir()
    (site.node / name).rename(away / name)
    (site.node / name).symlink_to(away / name)
    site.give(site.node / name, site.caller)
    site.give(away, OTHER)

    refused(site.run("plan"), f"{away} belongs to uid {OTHER}")


def test_a_hook_is_the_one_beside_the_settings_and_not_one_where_the_caller_is(site: Site) -> None:
    """The caller may be in a folder of another user, below the settings."""
    site.write('[hooks]\nactivated = ["hooks/tell"]\n')
    site.give(site.work, OTHER)
    (site.work / "hooks").mkdir()
    (site.work / "hooks" / "tell").touch(0o755)
    site.give(site.work / "hooks" / "tell", OTHER)

    assert site.run("plan").code == 0
    found = settings_file.decode(site.settings.read_bytes(), site.node)
    assert found.command(found.hooks.activated) == (str(site.node / "hooks" / "tell"),)


@pytest.mark.parametrize("mode", [0o775, 0o777])
def test_a_hook_that_is_missing_may_not_be_put_there_by_another_user(site: Site, mode: int) -> None:
    hooks = site.node / "hooks"
    hooks.mkdir()
    hooks.chmod(mode)
    site.give(hooks, site.caller)
    site.write('[hooks]\nhealthy = ["sh", "hooks/check.sh"]\n')

    refused(site.run("plan"), f"{hooks} may be changed by ")


@pytest.mark.parametrize("name", ["root.json", "models.lock", "store"])
def test_what_is_not_there_yet_may_not_be_put_there_by_another_user(site: Site, shared: Path, name: str) -> None:
    key, table = {"root.json": ("root", "network"), "models.lock": ("lockfile", "network"), "store": ("path", "store")}[name]
    extra = f'{key} = "{shared / name}"\n'
    site.write(extra if table == "network" else f"[{table}]\n{extra}")

    refused(site.run("plan"), f"{shared} may be changed by ")


def test_without_settings_what_lies_in_another_users_folder_is_not_used(site: Site) -> None:
    site.settings.unlink()
    site.give(site.node, OTHER)

    refused(site.run("plan", folder=site.node), f"{site.node} belongs to uid {OTHER}")


def test_without_settings_another_users_trust_root_is_not_used(site: Site) -> None:
    site.settings.unlink()
    site.give(site.node / "root.json", OTHER)

    refused(site.run("plan", folder=site.node), f"{site.node / 'root.json'} belongs to uid {OTHER}")


# -- what a person names ---------------------------------------------------------------------------


def test_settings_that_are_named_are_used_with_all_that_they_name(site: Site) -> None:
    for path in (site.node, *site.node.rglob("*")):
        site.give(path, OTHER)

    assert site.run("plan", "--config", str(site.settings)).code == 0


def test_settings_that_the_environment_names_are_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONCILE_CONFIG", str(site.settings))
    site.give(site.settings, OTHER)

    assert site.run("plan").code == 0


def test_the_hint_gives_the_command_that_uses_the_settings_all_the_same(site: Site) -> None:
    site.give(site.node, OTHER)

    assert f"--config {site.settings}" in site.run("plan").err


def test_init_says_at_once_that_its_settings_have_to_be_named(site: Site) -> None:
    site.node.chmod(0o775)
    site.settings.unlink()

    ran = site.run("init", folder=site.node)

    assert ran.code == 0, ran
    assert (
        f"reconcile lock --config {site.settings} (without --config it is not used: {site.node} may be changed by other users)" in ran.out
    )


# -- the function ----------------------------------------------------------------------------------


def test_a_file_system_that_another_user_serves_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FUSE file system says of its files that they are root's, if its user likes."""
    mounted = Path("/dev/shm")
    device = mounted.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /tmp rw,nosuid - fuse.x x rw,user_id={OTHER},group_id=0,allow_other\n"
    monkeypatch.setattr(files, "_MOUNTS", tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_text(line)

    with pytest.raises(UntrustedFile, match="/dev/shm is in a file system that uid"):
        files.check_trusted_path(mounted, os.geteuid())
    (tmp_path / "mountinfo").write_text(line.replace(str(OTHER), "0"))
    files.check_trusted_path(mounted, os.geteuid())


def test_nobody_of_a_user_namespace_is_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, the owners that the namespace does not know all have one number, which is the caller's too."""
    monkeypatch.setattr(files, "_USERS", tmp_path / "uid_map")
    (tmp_path / "uid_map").write_text("0 100000 65536\n")
    assert files._owners(65534) == {0}
    (tmp_path / "uid_map").write_text("         0          0 4294967295\n")
    assert files._owners(65534) == {0, 65534}
    assert files._owners(SERVICE) == {0, SERVICE}


def test_the_bytes_are_those_of_the_file_that_was_checked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")

    assert files.read_trusted(tmp_path / "a", os.geteuid()) == b"a"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a plain file"):
        files.read_trusted(tmp_path / "fifo", os.geteuid())
    with pytest.raises(FileNotFoundError):
        files.read_trusted(tmp_path / "gone", os.geteuid())


def test_a_file_in_the_place_of_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")

    with pytest.raises(NotADirectoryError):
        files.read_trusted(tmp_path / "a" / "b", os.geteuid())


def test_a_sticky_folder_of_another_user_protects_nothing(site: Site) -> None:
    site.top.chmod(0o1777)
    site.give(site.top, OTHER)

    refused(site.run("plan"), f"{site.top} belongs to uid {OTHER}")
    assert stat.S_IMODE(site.top.stat().st_mode) == 0o1777
