"""
The swarm's aria2c: how it is started, as a user of its own, and how a node asks it.

Rules that hold here:

1. It is a process of another user (``deploy/systemd/reconcile-swarm.service``), which can write to its own folder and to nothing else. What
   it says is progress, and what it writes are bytes to be hashed: none of it is believed.
2. It asks the given trackers alone: no DHT, no peer exchange, no local discovery, no web seed, no tracker of a torrent's own.
3. Which addresses it reaches is for the system to say, not for aria2, which connects to whatever a tracker names: the unit's IPAddressDeny.
4. It is asked over JSON-RPC on loopback, with a secret that is new at each start and stands in a file for its group. The node calls from
   ``CALLER``, an address of 127.0.0.0/8 that is nobody else's, so that the unit can allow that one and deny the rest of loopback.
5. An answer has a bound, and a call a time limit: a process that was taken over can neither fill this one's memory nor hold it up.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import secrets
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from reconciler.core.errors import FetchError, SettingsError
from reconciler.fetch import aria2_daemon, aria2_protocol
from reconciler.fetch.aria2_protocol import Status
from reconciler.fetch.settings import SwarmSettings

#: Where the node's calls come from; ``deploy/systemd/reconcile-swarm.service`` names it too.
CALLER = "127.6.8.1"
CONTACT, INCOMING = "rpc.json", "incoming"
#: The bound of a call as a whole, however slowly an answer comes.
CALL_SECONDS = 5.0
_MOST_ANSWER_BYTES = 4 << 20


class SwarmLost(Exception):
    """The swarm's aria2c is not there, or does not behave as it must."""


class Contact(Struct, frozen=True, kw_only=True):
    """Where the swarm's aria2c is asked: a port of loopback, and the secret of this start."""

    port: Annotated[int, Meta(ge=1, le=65535)]
    secret: str

    def __repr__(self) -> str:
        """Leave the secret out."""
        return f"Contact(port={self.port})"


class PeerStatus(Struct, frozen=True, kw_only=True):
    """The status of a torrent: *uploaded* bytes since it was added, and what aria2 says of the download."""

    download: Status
    uploaded: int


class Peer(Struct, frozen=True):
    """A connected peer: its address, and whether it has all of the torrent."""

    ip: Annotated[str, Meta(max_length=64)]
    seeder: Literal["true", "false"]


_Number = Annotated[str, Meta(pattern=r"^[0-9]{1,18}(?!\n)$")]


class _Answer(Struct, frozen=True):
    """The form of an answer to tellStatus, as far as it is read."""

    gid: str
    status: Literal["active", "waiting", "paused", "error", "complete", "removed"]
    totalLength: _Number  # noqa: N815  aria2's names
    completedLength: _Number  # noqa: N815
    downloadSpeed: _Number = "0"  # noqa: N815
    uploadLength: _Number = "0"  # noqa: N815
    errorCode: _Number = "0"  # noqa: N815
    bitfield: Annotated[str, Meta(pattern=r"^[0-9a-f]*(?!\n)$")] = ""


# -- the process -----------------------------------------------------------------------------------


def configuration(settings: SwarmSettings, contact: Contact | None) -> str:
    """Return aria2's configuration file for peers; without a *contact* nobody can ask it anything."""
    lines: dict[str, object] = {
        "enable-dht": "false",
        "enable-dht6": "false",
        "enable-peer-exchange": "false",
        "bt-enable-lpd": "false",
        "follow-torrent": "false",
        "follow-metalink": "false",
        "bt-save-metadata": "false",
        "listen-port": settings.ports,
        "bt-max-peers": settings.peers,
        "max-overall-upload-limit": settings.upload_limit_bytes,
        "bt-detach-seed-only": "true",  # what is only seeded takes no place of a download
        "max-concurrent-downloads": settings.concurrent,
        "bt-tracker-connect-timeout": 10,
        "bt-tracker-timeout": 20,
        "file-allocation": "none",
        "disk-cache": "0",  # what it reports as there is in the file
        "auto-save-interval": "0",  # pieces are checked anew instead: a control file of before a power cut lies
        "auto-file-renaming": "false",
        "allow-overwrite": "false",
        "no-netrc": "true",
        "check-certificate": "true",
        "max-download-result": 10000,
        "quiet": "true",
    }
    if authority := settings.ca_file or ssl.get_default_verify_paths().cafile:
        lines["ca-certificate"] = str(authority)
    if contact:
        lines |= {
            "enable-rpc": "true",
            "rpc-listen-all": "false",
            "rpc-allow-origin-all": "false",
            "rpc-listen-port": contact.port,
            "rpc-secret": contact.secret,
            "rpc-save-upload-metadata": "false",
            "rpc-max-request-size": "16M",  # a torrent, in base64
        }
    return "".join(f"{key}={value}\n" for key, value in lines.items())


def run(settings: SwarmSettings) -> NoReturn:
    """
    Become the swarm's aria2c, which serves until it is ended.

    Raises:
        SettingsError: its folder cannot be written to.
        FetchError: there is no aria2c.
    """
    binary = aria2_daemon.find()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    contact = Contact(port=port, secret=secrets.token_hex(32))
    try:
        incoming = settings.folder / INCOMING
        incoming.mkdir(exist_ok=True)
        incoming.chmod(0o2770)  # the node's user, of this group, deletes what it has taken
        _write(settings.folder / "aria2.conf", configuration(settings, contact).encode(), 0o600)
        _write(settings.folder / CONTACT, msgspec.json.encode(contact), 0o640)
    except OSError as error:
        hint = "run it as the user whom the folder belongs to, as deploy/systemd/reconcile-swarm.service does"
        raise SettingsError(f"[swarm] folder: {error.filename or settings.folder}: {error.strerror}", hint=hint) from None
    os.umask(0o007)
    _become(binary, [f"--conf-path={settings.folder / 'aria2.conf'}"], settings.folder)


class Seed(Struct, frozen=True, kw_only=True):
    """A torrent to seed, and the file of its bytes."""

    torrent: Path
    file: Path


def seed(settings: SwarmSettings, seeds: Sequence[Seed], trackers: Sequence[str]) -> NoReturn:
    """
    Seed *seeds* until this process is ended, with an aria2c that nobody can ask anything for each port of the settings.

    aria2 has few requests under way over one connection: over 100 ms there and back each seeder gave a node 0.4 MB/s. With four or more,
    sixteen nodes took more copies from the origin. Each has its part of the upload limit.

    Raises:
        SettingsError: its folder cannot be written to.
        FetchError: there is no aria2c, or one ended.
    """
    binary = aria2_daemon.find()
    first, _, last = settings.ports.partition("-")
    ports = range(int(first), int(last or first) + 1)
    commands = [[str(binary), *_seeding_arguments(settings, port, len(ports), seeds, trackers)] for port in ports]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            process = subprocess.Popen([*_ENDS_WITH_US, *command], env=_environment(settings.folder), stdin=subprocess.DEVNULL)
            processes.append(process)
        _wait_for_any(processes)
        raise FetchError("an aria2c that seeds has ended", hint="its port is in use, or it was killed: start it again, with other --ports")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait_for_any(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until one of *processes* has ended."""
    ends = [os.pidfd_open(process.pid) for process in processes]
    try:
        select.select(ends, [], [])
    finally:
        for end in ends:
            os.close(end)


#: What lets the kernel end a child with this process; where it is missing, systemd ends all of the unit.
_ENDS_WITH_US = ["/usr/bin/setpriv", "--pdeathsig", "KILL", "--"] if Path("/usr/bin/setpriv").exists() else []


def _seeding_arguments(settings: SwarmSettings, port: int, parts: int, seeds: Sequence[Seed], trackers: Sequence[str]) -> list[str]:
    """Write the files of the seeder at *port*, one of *parts*, and return its arguments; raises SettingsError."""
    listed = "".join(f"{one.torrent}\n{_options_of(one, trackers)}" for one in seeds)
    own = replace(settings, ports=str(port), upload_limit_bytes=-(-settings.upload_limit_bytes // parts))
    paths = settings.folder / f"seeds-{port}.txt", settings.folder / f"aria2-{port}.conf"
    try:
        for path, text in zip(paths, (listed, configuration(own, None)), strict=True):
            _write(path, text.encode(), 0o600)
    except OSError as error:
        raise SettingsError(f"{error.filename or settings.folder}: {error.strerror}", hint="--folder names a folder of this user") from None
    return [f"--conf-path={paths[1]}", f"--input-file={paths[0]}"]


def _options_of(one: Seed, trackers: Sequence[str]) -> str:
    options = {
        "dir": one.file.parent,
        "index-out": f"1={one.file.name}",
        "bt-tracker": ",".join(trackers),
        **SEEDING,
        "seed-ratio": "0.0",
    }
    return "".join(f" {key}={value}\n" for key, value in options.items())


#: The store's, or the publisher's, bytes were verified when they came in: reading them once more at each start would cost hours.
SEEDING = {"bt-seed-unverified": "true", "check-integrity": "false", "allow-overwrite": "true"}


def _become(binary: Path, arguments: list[str], folder: Path) -> NoReturn:
    os.execve(binary, [str(binary), *arguments], _environment(folder))  # noqa: S606  the path is the packaged one, or the system's


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of aria2: no ~/.netrc, no ~/.aria2, no proxy."""
    return {"HOME": str(folder), "LANG": "C.UTF-8"}


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a new file, whatever stood there before: a link is replaced and not followed."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        os.fchmod(fd, mode)


# -- asking it -------------------------------------------------------------------------------------


class Client:
    """Calls to the swarm's aria2c whose folder is *folder*. For one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, torrent: bytes, options: Mapping[str, str]) -> None:
        """Add a torrent with *options*, ``gid`` among them; one that is there already stays as it is."""
        try:
            self._call([("aria2.addTorrent", [base64.b64encode(torrent).decode(), [], dict(options)])])
        except _Refused as error:
            if "not unique" not in str(error) and "already" not in str(error):
                raise SwarmLost(f"it refuses a torrent: {error}") from None

    def poll(self, gids: Sequence[str]) -> dict[str, PeerStatus]:
        """Return the status of each of *gids*; one that aria2 does not know is left out."""
        found = {}
        for gid in gids:
            try:
                answer = msgspec.convert(self._call([("aria2.tellStatus", [gid, list(_Answer.__struct_fields__)])])[0], _Answer)
            except _Refused:
                continue
            except msgspec.ValidationError:
                raise SwarmLost("its answer is malformed") from None
            found[gid] = PeerStatus(download=aria2_protocol.status(msgspec.structs.asdict(answer)), uploaded=int(answer.uploadLength))
        return found

    def peers(self, gid: str) -> list[Peer]:
        """Return the peers to which the torrent *gid* is connected; none where aria2 does not know it."""
        try:
            return msgspec.convert(self._call([("aria2.getPeers", [gid])])[0], list[Peer])
        except _Refused:
            return []
        except msgspec.ValidationError:
            raise SwarmLost("its answer is malformed") from None

    def limit(self, gid: str, rate: int) -> None:
        """Let the torrent *gid* take at most *rate* bytes a second; 0: no limit. It goes on giving what it has."""
        with contextlib.suppress(_Refused):
            self._call([("aria2.changeOption", [gid, {"max-download-limit": str(rate)}])])

    def known(self) -> frozenset[str]:
        """Return the gid of every torrent that it has, ended ones too."""
        calls: list[aria2_daemon.Call] = [
            ("aria2.tellActive", [["gid"]]),
            ("aria2.tellWaiting", [0, 10000, ["gid"]]),
            ("aria2.tellStopped", [0, 10000, ["gid"]]),
        ]
        try:
            return frozenset(str(one["gid"]) for call in calls for one in self._call([call])[0])
        except (_Refused, LookupError, TypeError):
            raise SwarmLost("its answer is malformed") from None

    def remove(self, gid: str) -> None:
        """Make it end and forget a torrent; nothing happens where it has none."""
        for method in ("aria2.forceRemove", "aria2.removeDownloadResult"):
            try:
                self._call([(method, [gid])])
            except _Refused:
                continue

    def _call(self, calls: list[aria2_daemon.Call]) -> list[Any]:
        contact = self._contact()
        request = [
            {"jsonrpc": "2.0", "id": index, "method": method, "params": [f"token:{contact.secret}", *params]}
            for index, (method, params) in enumerate(calls)
        ]
        connection = http.client.HTTPConnection("127.0.0.1", contact.port, timeout=CALL_SECONDS, source_address=(CALLER, 0))
        try:
            connection.connect()
            with _bounded(connection.sock):
                connection.request("POST", "/jsonrpc", json.dumps(request), {"Content-Type": "application/json"})
                data = connection.getresponse().read(_MOST_ANSWER_BYTES + 1)
            answers = json.loads(data)
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise SwarmLost(f"it does not answer ({type(error).__name__})") from None
        finally:
            connection.close()
        return [_result(answer) for answer in _in_order(answers, len(calls))]

    def _contact(self) -> Contact:
        try:
            fd = os.open(self._folder / CONTACT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                return msgspec.json.decode(file.read(4096), type=Contact)
        except (OSError, msgspec.DecodeError) as error:
            raise SwarmLost(f"{self._folder / CONTACT} cannot be read ({type(error).__name__})") from None


@contextlib.contextmanager
def _bounded(connection: socket.socket) -> Iterator[None]:
    """End *connection* after the bound of a call: its own time limit is for each byte anew."""

    def end() -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(CALL_SECONDS, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Refused(Exception):
    """aria2 refused a call."""


def _in_order(answers: Any, count: int) -> list[Any]:
    if not isinstance(answers, list) or len(answers) != count or not all(isinstance(one, dict) for one in answers):
        raise SwarmLost("its answer is malformed")
    return answers


def _result(answer: dict[str, Any]) -> Any:
    if "result" in answer:
        return answer["result"]
    error = answer.get("error")
    raise _Refused(str(error.get("message", "refused"))[:200] if isinstance(error, dict) else "refused")
