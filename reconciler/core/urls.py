"""
Addresses of blobs, and templates of them: what may stand in a snapshot or in the settings.

Checked while a document is decoded, so that nothing but a plain address ever reaches a connection.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_URL_BYTES = re.compile(r"[!-\[\]-~]+")  # printable ASCII without space and backslash (RFC 3986 has neither)
#: A DNS name or an address, and a port. RFC 3986 lets a host be anything, percent-escapes included, and readers differ about the rest.
_AUTHORITY = re.compile(r"(?:(?:[A-Za-z0-9_-]+\.)*[A-Za-z0-9_-]+\.?|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")


def check_url(url: str) -> None:
    """
    Refuse whatever is not a plain absolute http or https URL without credentials.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not _URL_BYTES.fullmatch(url):
        raise ValueError("a URL is printable ASCII, without spaces or backslashes")
    parts = urlsplit(url)
    if parts.scheme not in {"https", "http"}:
        raise ValueError(f"scheme {parts.scheme!r} is not http or https")
    if not parts.hostname or "@" in parts.netloc:
        raise ValueError("a URL names a host and carries no user or password")
    if not _AUTHORITY.fullmatch(parts.netloc):
        raise ValueError(f"{parts.netloc!r} is not a host")
    if "#" in url:
        raise ValueError("a URL carries no fragment")
    _ = parts.port  # raises ValueError if it is no port


_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[!-\[\]-~]+")  # RFC 3986's characters after the bucket's name (S3's rules)


def check_source(url: str) -> None:
    """
    Refuse whatever is neither a plain http or https URL nor ``s3://BUCKET/KEY``.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not url.startswith("s3://"):
        check_url(url)
    elif not _BUCKET.fullmatch(url) or "?" in url or "#" in url:
        raise ValueError("it is not of the form s3://BUCKET/KEY, the key percent-encoded where it has other characters")


def check_own_template(template: str) -> None:
    """
    Refuse a node's own template that does not name the blob it is for; beside ``{algorithm}`` and ``{hex}`` it may have ``{hex:2}``.

    Raises:
        ValueError: says what is wrong with it.
    """
    check_template(template.replace("{hex:2}", "00"))


def check_template(template: str) -> None:
    """
    Refuse a fallback template that does not name the blob it is for.

    Raises:
        ValueError: says what is wrong with it.
    """
    if "{hex}" not in template:
        raise ValueError("a template names {hex}")
    filled = expand(template, "sha256", "0" * 64)
    if "{" in filled or "}" in filled:
        raise ValueError("a template knows {algorithm} and {hex} alone")
    check_url(filled)


def expand(template: str, algorithm: str, digits: str) -> str:
    """Return the URL that *template* stands for. Not ``str.format``, whose fields reach attributes."""
    return template.replace("{algorithm}", algorithm).replace("{hex}", digits).replace("{hex:2}", digits[:2])
