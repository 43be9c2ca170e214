"""On what terms aria2 runs: its configuration, each line with its reason. Pure."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from reconciler.fetch.credentials import Credentials
from reconciler.fetch.settings import FetchSettings


def configuration(settings: FetchSettings, secret: str, port: int, home: Path, credentials: Credentials) -> str:
    """Return aria2's configuration file."""
    authority = settings.ca_file or ssl.get_default_verify_paths().cafile
    lines = {
        "enable-rpc": "true",
        "rpc-listen-port": port,
        "rpc-secret": secret,
        "rpc-listen-all": "false",
        "rpc-allow-origin-all": "false",  # no web page may talk to it
        "rpc-save-upload-metadata": "false",  # nothing is written but the file that was asked for
        "rpc-max-request-size": "16M",  # hundreds of transfers are added in one call
        "stop-with-process": os.getpid(),
        "quiet": "true",
        # -- what a server may make it do: nothing but send bytes
        "follow-torrent": "false",
        "follow-metalink": "false",  # a content type would make it download other files, named by the server
        "enable-dht": "false",
        "enable-dht6": "false",
        "bt-enable-lpd": "false",
        "enable-peer-exchange": "false",
        "http-accept-gzip": "false",
        "no-want-digest-header": "true",  # the server's own digest is worth nothing here
        "remote-time": "false",  # the modification time is ours to compare
        "user-agent": "reconciler",
        "check-certificate": "true",
        "min-tls-version": "TLSv1.2",
        # -- the file
        "file-allocation": "none",  # anything else, a crash and a lost record make zeros that count as downloaded
        "disk-cache": "0",  # doubles the rate, and what is reported as done is in the file
        "auto-file-renaming": "false",
        "allow-overwrite": "false",
        "continue": "true",  # what ``staging`` found to be there
        # True, against the usual advice: false makes it start again from byte 0 *in the same file*, behind the back of the hashing that
        # already passed there. An error 8 ends the attempt here, and the next one has a file of its own.
        "always-resume": "true",
        "auto-save-interval": "0",  # it is never used: ``staging`` writes it anew. Saving it stops the transfer for an fsync
        "stream-piece-selector": "inorder",
        "allow-piece-length-change": "true",
        # -- time and rate
        "max-concurrent-downloads": settings.concurrent,
        "max-overall-download-limit": settings.limit_bytes,
        # A connection has a share of the file's rate; the file's own rate is watched by us.
        "lowest-speed-limit": least_rate(settings) // max(1, settings.connections),
        "timeout": _whole(settings.timeout_seconds, 600),
        "connect-timeout": _whole(min(settings.timeout_seconds, 15.0), 600),
        "max-tries": 3,  # of a connection; the source is asked anew by us
        "retry-wait": 1,
        "max-file-not-found": 1,
        "max-download-result": 10000,  # an ended transfer that it forgets would look like a lost one
        "uri-selector": "feedback",
        "server-stat-timeout": 3600,
    }  # fmt: skip
    if authority:
        lines["ca-certificate"] = str(authority)  # the static build and Debian's look in different places
    if credentials.text():
        lines["netrc-path"] = str(home / "netrc")  # by host, looked up anew after each redirect; a header would travel along
    else:
        lines["no-netrc"] = "true"
    return "".join(f"{key}={value}\n" for key, value in lines.items())


def least_rate(settings: FetchSettings) -> int:
    """Return the bytes a second below which a file's sources count as slow: never more than the operator's own limit allows it."""
    if not settings.limit_bytes:
        return settings.min_rate_bytes
    return min(settings.min_rate_bytes, settings.limit_bytes // (4 * settings.concurrent))


def _whole(value: float, most: int) -> int:
    return max(1, min(round(value), most))
