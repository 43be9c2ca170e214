"""
Addresses of blobs, templates of them, and hosts: what may stand in a snapshot or in the settings.

Rules that hold here:

1. Checked while a document is decoded, so that nothing but a plain address ever reaches a connection.
2. A pattern of hosts is a name or an address, or ``*.`` before a name: ``*.example.org`` matches every name below ``example.org``, one or
   more labels, and not itself. What would match nothing is refused where it is written: addresses have no names below them, and neither
   ports, schemes nor other characters are part of a host.
3. Names of hosts are compared in their one spelling: lower case, without the dot at the end. Names beyond ASCII are written as DNS has
   them (``xn--…``), so that no two characters that look alike are taken for one another.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
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


_NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


def normal_host(host: str) -> str:
    """Return *host* in its one spelling."""
    return host.lower().removesuffix(".")


def check_host(text: str) -> None:
    """
    Check that *text* is a host: a DNS name, or an address without brackets.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not text.isascii():
        raise ValueError(f"{text!r} is not a host in ASCII; write it as DNS has it (xn--…)")
    host = normal_host(text)
    if _is_address(host):
        return
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise ValueError(f"{text!r} is not a host name; it has no scheme, port or path, and * stands only in front, as in *.example.org")
    if host.rpartition(".")[2].isdigit():
        raise ValueError(f"{text!r} ends in a number, and is no IPv4 address")


def check_pattern(text: str) -> None:
    """
    Check that *text* is a host, or ``*.`` before a name.

    Raises:
        ValueError: says what is wrong with it.
    """
    check_host(text.removeprefix("*."))
    if text.startswith("*.") and _is_address(normal_host(text[2:])):
        raise ValueError(f"{text!r} matches nothing: an address has no names below it")


def host_matches(host: str, patterns: Collection[str]) -> bool:
    """Return whether one of *patterns*, each in its one spelling, matches *host*, in its one spelling."""
    if not host:
        return False
    if host in patterns:
        return True
    if _is_address(host):
        return False
    rest = host
    while "." in rest:
        rest = rest.partition(".")[2]
        if f"*.{rest}" in patterns:
            return True
    return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
