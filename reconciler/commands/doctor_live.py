"""
Checks of ``doctor`` that try what a sync will need: the snapshot and the next root as they are published now, the hooks, the store's lock.

The rules are those of ``doctor``: nothing is changed, and what is fetched is thrown away.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

import msgspec

from reconciler.commands import documents, node_trust
from reconciler.commands.context import NodeContext
from reconciler.commands.doctor import Check, CheckInput, CheckResult
from reconciler.core import trust, units
from reconciler.core.errors import FetchError, ReconcileError, SettingsError
from reconciler.fetch import credentials, error_pages, http, sources
from reconciler.fetch.connection import endpoint_of
from reconciler.fetch.resolver import InlineBody, ProbeRequest, ProbeResult, Resolved, Resolver
from reconciler.fetch.settings import FetchSettings
from reconciler.ports import Want
from reconciler.store import writer_lock

_SECONDS = 15.0
_MOST_SOURCES = 16
#: A server's clock is taken as right; HTTP gives whole seconds, and an answer takes some.
_CLOCK_SKEW = timedelta(minutes=5)


def published_snapshot(given: CheckInput) -> Iterator[CheckResult]:
    """Fetch the snapshot as a sync does, verify it, and compare the server's clock with this one."""
    if given.offline:
        yield CheckResult(name="published snapshot", level="ok", text="not checked (--offline)")
        return
    node = given.node
    try:
        data, served_at = _fetch(node)
    except ReconcileError as error:
        yield CheckResult(name="published snapshot", level="error", text=error.message, hint=error.hint)
        return
    if served_at is not None:
        yield _clock(served_at, given.now)
    try:
        verified = trust.verify(
            data, node_trust.trusted_root(node), now=given.now, trust_state=node_trust.read_trust_state(node), limits=node.limits
        )
    except ReconcileError as error:
        yield CheckResult(name="published snapshot", level="error", text=f"{error.name}: {error.message}", hint=error.hint)
        return
    found = verified.snapshot
    text = f"version {found.version}, validly signed, expires at {units.rfc3339(found.expires_at)}"
    yield CheckResult(name="published snapshot", level="ok", text=text)


def _fetch(node: NodeContext) -> tuple[bytes, datetime | None]:
    """Return the document at the snapshot's address, and the time that its server told."""
    if not http.is_url(node.snapshot):
        return documents.fetch(
            node.snapshot, node.download, cap=node.limits.envelope_bytes, hint=documents.NO_SNAPSHOT_HINT
        ).data or b"", None
    download = node.download
    with http.opened(
        node.snapshot,
        timeout_seconds=min(download.timeout_seconds, _SECONDS),
        headers={"Accept": "application/json, */*;q=0.1"},
        proxy=download.proxy,
        ca_file=str(download.ca_file or ""),
        allow_http=download.allow_http,
    ) as answer:
        data = b"".join(http.chunks(answer, node.snapshot, max_bytes=node.limits.envelope_bytes, within_seconds=_SECONDS))
        if page := error_pages.describe_non_envelope(answer.headers.get("Content-Type", ""), data):
            raise FetchError(f"{documents.redacted(node.snapshot)} answered with {page}")
        return data, _date(answer.headers.get("Date", ""))


def _date(text: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _clock(served_at: datetime, now: datetime) -> CheckResult:
    off = now - served_at
    if abs(off) <= _CLOCK_SKEW:
        return CheckResult(name="clock of the server", level="ok", text="agrees with this machine's")
    way = "ahead of" if off > timedelta(0) else "behind"
    text = f"this machine's clock is {units.human_time(abs(off).total_seconds())} {way} the clock of the snapshot's server"
    return CheckResult(name="clock of the server", level="error", text=text, hint="set the clock: `timedatectl set-ntp true`")


def newer_root(given: CheckInput) -> Iterator[CheckResult]:
    """Look for the next root where the settings say."""
    node = given.node
    if not node.root_updates:
        hint = 'set [network] root_updates = "{version}.root.json" beside the snapshot\'s address, or apply new roots by hand'
        yield CheckResult(name="newer root", level="warning", text="new trust roots are not looked for", hint=hint)
        return
    if given.offline:
        yield CheckResult(name="newer root", level="ok", text="not checked (--offline)")
        return
    root = node_trust.trusted_root(node)
    place = node.root_updates.replace("{version}", str(root.version + 1))
    try:
        envelope = documents.fetch(place, node.download, cap=node.limits.root_bytes).data or b""
        newer = trust.advance(root, envelope, limits=node.limits)
    except (FetchError, SettingsError) as error:
        yield CheckResult(name="newer root", level="ok", text=f"none beside root {root.version} ({error.message})")
    except ReconcileError as error:
        yield CheckResult(name="newer root", level="error", text=f"{documents.redacted(place)}: {error.message}", hint=error.hint)
    else:
        yield CheckResult(name="newer root", level="ok", text=f"root {newer.version} is there: the next sync applies it")


def source_bytes(given: CheckInput) -> Iterator[CheckResult]:
    """Ask each host that blobs come from for the first byte of one, with the credentials and under the rules of a download."""
    if given.offline or isinstance(given.lock, ReconcileError):
        return
    lock, node = given.lock.lock, given.node
    download = msgspec.structs.replace(node.download, signed_redirects=lock.redirects)
    if not lock.allow_node_fallback:
        download = msgspec.structs.replace(download, mirrors=(), fallback=())
    wants = tuple(Want(digest=name, size=blob.size, sources=blob.sources) for name, blob in lock.blob.items())
    chosen: dict[str, tuple[str, Want]] = {}
    for want in wants:
        for url in (*sources.expanded(want, download.mirrors), *sources.order(want, download.fallback)):
            if url.startswith(("http://", "https://")) and len(chosen) < _MOST_SOURCES:
                chosen.setdefault(str(endpoint_of(url)), (url, want))
    answers = _first_bytes(chosen, wants, download)
    for name in chosen:
        answer = answers.get(name)
        if isinstance(answer, Resolved | InlineBody):
            yield CheckResult(name=f"source {name}", level="ok", text="gives the first byte of a blob")
        else:
            text = answer.text if answer else f"did not answer within {_SECONDS:.0f} seconds"
            hint = "check the address, its credentials ([download.credentials]) and the proxy; other sources are tried in the meantime"
            yield CheckResult(name=f"source {name}", level="warning", text=text, hint=hint)


def _first_bytes(chosen: dict[str, tuple[str, Want]], wants: tuple[Want, ...], download: FetchSettings) -> dict[str, ProbeResult]:
    """Return what each source of *chosen*, by its name, answered in time."""
    ready = threading.Event()
    resolver = Resolver(download, credentials.read(download.netrc, download.credentials), ready.set)
    rules, names, found = sources.rules(wants, download), list(chosen), dict[str, ProbeResult]()
    ends = time.monotonic() + _SECONDS
    try:
        for token, (url, want) in enumerate(chosen.values()):
            resolver.submit(ProbeRequest(token=token, url=url, digest=want.digest, size=want.size, rules=rules))
        while len(found) < len(chosen) and time.monotonic() < ends:
            ready.wait(0.2)
            ready.clear()
            found |= {names[request.token]: result for request, result in resolver.results()}
    finally:
        resolver.close()
    return found


def hook_programs(given: CheckInput) -> Iterator[CheckResult]:
    """Check that the operator's commands are there and can be run."""
    for name, argv in (("activated", given.node.activated_hook), ("healthy", given.node.healthy_hook)):
        if not argv:
            continue
        found = shutil.which(argv[0])
        if found is None:
            hint = f"correct [hooks] {name} in the settings, or make the file executable"
            yield CheckResult(name=f"hook {name}", level="error", text=f"{argv[0]} is not there, or cannot be run", hint=hint)
        else:
            yield CheckResult(name=f"hook {name}", level="ok", text=found)


def writer(given: CheckInput) -> Iterator[CheckResult]:
    """Say who holds the store now."""
    found = writer_lock.holder(given.node.layout.lock_file)
    text = f"held by {found}{_command_of(found)}" if found else "nobody holds the store"
    yield CheckResult(name="store lock", level="ok", text=text)


def _command_of(holder: str) -> str:
    try:
        words = Path("/proc", holder.removeprefix("process "), "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return f": {' '.join(word.decode(errors='replace') for word in words[:6] if word)}"


CHECKS: tuple[Check, ...] = (published_snapshot, newer_root, source_bytes, hook_programs, writer)
