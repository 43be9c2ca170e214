"""
Objects in S3 buckets: ``s3://BUCKET/KEY`` stands in the lock, and the node makes a signed URL from it when it fetches.

Rules that hold here:

1. Endpoint, region and credentials are those that the AWS tools use on this machine (environment, ``~/.aws``, instance role): botocore
   finds them. No secret and no signature enters the lock, the store or a log.
2. A signed URL is good for an hour. After that the source is resolved again.
"""

from __future__ import annotations

import functools
import threading
from typing import Any
from urllib.parse import unquote, urlsplit

from reconciler.fetch.sources import Refused, clean

_SECONDS = 3600
_MAKING = threading.Lock()


def is_object(url: str) -> bool:
    """Return whether *url* names an object in a bucket."""
    return url.startswith("s3://")


def split(url: str) -> tuple[str, str]:
    """Return the bucket and the key of ``s3://BUCKET/KEY``."""
    parts = urlsplit(url)
    return parts.netloc, unquote(parts.path.removeprefix("/"))


def locate(url: str) -> str:
    """
    Return the https URL from which *url* can be fetched now; any but an ``s3://`` one is returned as it is.

    Raises:
        Refused: botocore is not installed, or has no credentials.
    """
    if not is_object(url):
        return url
    bucket, key = split(url)
    try:
        found: str = client().generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=_SECONDS)
    except Refused:
        raise
    except Exception as error:  # noqa: BLE001  botocore's errors have no common base, and some are ValueErrors
        raise Refused(f"no signed URL can be made for it: {clean(str(error))}") from None
    return found


def client() -> Any:
    """
    Return botocore's client of S3, as this machine's environment configures it.

    Raises:
        Refused: botocore is not installed.
    """
    with _MAKING:  # making one is not safe for threads, using it is
        return _client()


@functools.lru_cache(maxsize=1)
def _client() -> Any:
    try:
        import botocore.config
        import botocore.session
    except ImportError:
        raise Refused("s3:// needs botocore, which is not installed: pip install 'reconcile-models[s3]'") from None
    return botocore.session.get_session().create_client("s3", config=botocore.config.Config(signature_version="s3v4"))
