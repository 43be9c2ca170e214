"""
Objects of an S3 bucket: ``s3://BUCKET/KEY``, or ``s3://BUCKET/PREFIX/`` for all below it.

What is written is the ``s3://`` address; each node makes a signed URL from it with credentials of its own. Objects are read to be hashed:
an ETag is no digest of the content.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from reconciler.core.errors import PublishError
from reconciler.publish.sources.listing import Listing, SourceFile, chosen

_MOST_OBJECTS = 10_000


def list_files(bucket: str, key: str, client: Any, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> Listing:
    """
    Return the object *key* of *bucket*, or all objects below the prefix *key* where it ends in ``/`` or is empty.

    Raises:
        PublishError: there are none, or the service refuses.
    """
    if key and not key.endswith("/"):
        return Listing(files=(_file(bucket, key, key.rpartition("/")[2]),))
    try:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        keys = [one["Key"] for page in pages for one in page.get("Contents", ())]
    except Exception as error:  # noqa: BLE001  the library's errors have no common base
        raise PublishError(f"the objects of s3://{bucket}/{key} cannot be listed: {error}") from None
    found = [one.removeprefix(key) for one in keys if not one.endswith("/")]
    if len(found) > _MOST_OBJECTS:
        raise PublishError(f"s3://{bucket}/{key} has {len(found):,} objects", hint="name a longer prefix, or objects")
    return Listing(files=tuple(_file(bucket, key + path, path) for path in chosen(found, include, exclude)))


def _file(bucket: str, key: str, path: str) -> SourceFile:
    url = f"s3://{bucket}/{quote(key)}"
    return SourceFile(path=path, place=url, urls=(url,))
