"""
Statuses of nodes, from where an operator collects them: a folder, ``s3://BUCKET/PREFIX``, or ``oci://REGISTRY/REPOSITORY[:TAG]``.

Rules that hold here:

1. Credentials are the operator's own, and are found where ``read_source`` finds them.
2. A status counts by its signature alone (``fleet.collect``): neither the bucket nor the registry is trusted.
3. A place that stops answering ends the reading: a report of half a fleet would call the other half silent. An object that was deleted
   while the others were read is one that cannot be read.
4. Nothing larger than a status is read; ``_AHEAD`` of them are in memory at most.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct

from reconciler.commands.read_source import SourceReader
from reconciler.core.errors import FetchError, PublishError
from reconciler.core.text import printable
from reconciler.fetch import bucket
from reconciler.fetch.connection import KeptConnections
from reconciler.fetch.sources import Refused
from reconciler.fleet import collect, statement
from reconciler.fleet.collect import Status
from reconciler.publish.sources import registry
from reconciler.publish.sources.listing import SourceFile

_AT_ONCE = 8
_AHEAD = 64
_TAGS_A_PAGE = 1000
_MOST_PAGES = 1000
_Task = Callable[[], list[Status]]


def statuses(place: str) -> Iterator[Status]:
    """
    Yield the statuses in *place*, a folder or the address of a bucket's prefix or a registry's repository.

    Raises:
        SettingsError: there is no such folder.
        FetchError: the bucket or the registry does not answer, or refuses.
        PublishError: the address is not of a known form.
    """
    if bucket.is_object(place):
        yield from _side_by_side(_in_bucket(place))
    elif place.startswith("oci://"):
        with contextlib.closing(_Registry(place)) as found:
            yield from _side_by_side(found.tasks())
    else:
        yield from collect.in_folder(Path(place))


def _side_by_side(tasks: Iterable[_Task]) -> Iterator[Status]:
    """Yield what *tasks* find, in their order; the next ones are at work meanwhile."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    waiting: deque[Future[list[Status]]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) >= _AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(name: str, data: bytes) -> Status:
    return name, lambda: data


def _unreadable(name: str, reason: str) -> Status:
    def read() -> bytes:
        raise OSError(reason)

    return name, read


def _too_large(name: str) -> Status:
    return name, lambda: bytes(statement.MAX_BYTES + 1)


# -- a bucket --------------------------------------------------------------------------------------


def _in_bucket(place: str) -> Iterator[_Task]:
    """Yield what reads each object below the prefix *place* whose name ends in ``.json``."""
    name, key = bucket.split(place)
    prefix = f"{key.rstrip('/')}/" if key.rstrip("/") else ""
    try:
        client = bucket.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=prefix):
            for found in page.get("Contents", ()):
                title = found["Key"].removeprefix(prefix)
                if collect.is_status(title):
                    yield lambda key=found["Key"], title=title, size=found["Size"]: [_object(client, name, key, title, size)]  # type: ignore[misc]
    except Refused as error:
        raise FetchError(str(error)) from None
    except GeneratorExit:
        raise
    except Exception as error:  # noqa: BLE001  botocore's errors have no common base
        raise FetchError(f"the objects of {place} cannot be listed: {printable(str(error), 300)}") from None


def _object(client: Any, name: str, key: str, title: str, size: int) -> Status:
    if size > statement.MAX_BYTES:
        return _too_large(title)
    try:
        with contextlib.closing(client.get_object(Bucket=name, Key=key)["Body"]) as body:
            return _read(title, body.read(statement.MAX_BYTES + 1))
    except client.exceptions.NoSuchKey:
        return _unreadable(title, "it was deleted meanwhile")
    except Exception as error:  # noqa: BLE001  as above
        raise FetchError(f"s3://{name}/{key} cannot be read: {printable(str(error), 300)}") from None


# -- a registry ------------------------------------------------------------------------------------


class _Tags(Struct):
    tags: list[str] | None = None


class _Registry:
    """The statuses in a repository: of one artifact, or of the artifact of each tag; they are its layers whose titles end in ``.json``."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._reference = registry.parse(place)
        self._has_tag = ":" in place.rpartition("/")[2] or bool(self._reference.digest)
        self._reader = SourceReader()
        self._local = threading.local()
        self._kept: list[KeptConnections] = []

    def tasks(self) -> Iterator[_Task]:
        """Yield what reads each artifact; of one artifact alone, what reads each of its statuses."""
        if self._has_tag:
            yield from (lambda file=file: [self._layer(file, file.path)] for file in self._layers(self._place))
            return
        base = f"{self._reference.registry}/{self._reference.repository}"
        for tag in self._tags():
            yield lambda tag=tag: self._artifact(f"oci://{base}:{tag}", tag)  # type: ignore[misc]

    def _artifact(self, place: str, tag: str) -> list[Status]:
        try:
            return [self._layer(file, f"{tag}/{file.path}") for file in self._layers(place)]
        except PublishError as error:
            return [_unreadable(tag, error.message)]

    def _layers(self, place: str) -> list[SourceFile]:
        return [file for file in registry.list_files(place, self._document).files if collect.is_status(file.path) and not file.unpack]

    def _layer(self, file: SourceFile, name: str) -> Status:
        if file.size > statement.MAX_BYTES:
            return _too_large(name)
        return _read(name, self._document(file.place, {}))

    def _tags(self) -> Iterator[str]:
        """Yield all tags, page by page (OCI distribution, "Listing Tags"); a registry may give them all at once, each time."""
        last, known = "", set[str]()
        for _ in range(_MOST_PAGES):
            more = f"&last={quote(last)}" if last else ""
            data = self._document(f"{self._reference.api}/tags/list?n={_TAGS_A_PAGE}{more}", {})
            try:
                found = msgspec.json.decode(data, type=_Tags).tags or []
            except msgspec.DecodeError:
                raise FetchError(f"what {self._reference.registry} gives as the tags of {self._place} is no list of tags") from None
            new = [tag for tag in found if tag not in known]
            yield from new
            if not new or len(found) < _TAGS_A_PAGE:
                return
            known.update(new)
            last = found[-1]

    def _document(self, url: str, headers: dict[str, str]) -> bytes:
        kept: KeptConnections | None = getattr(self._local, "kept", None)
        if kept is None:
            kept = self._local.kept = KeptConnections()
            self._kept.append(kept)
        return self._reader.document(url, headers, kept=kept)

    def close(self) -> None:
        """Close all connections; no thread is at work any more."""
        for kept in self._kept:
            kept.close()
