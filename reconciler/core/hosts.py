"""
Names of hosts, and patterns of them: ``*.example.org`` matches every name below ``example.org``, one or more labels, and not itself.

Rules that hold here:

1. A pattern is a name or an address, or ``*.`` before a name. What would match nothing is refused where it is written: addresses have no
   names below them, and neither ports, schemes nor other characters are part of a host.
2. Names are compared in their one spelling: lower case, without the dot at the end. Names beyond ASCII are written as DNS has them
   (``xn--…``), so that no two characters that look alike are taken for one another.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

_NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


def normal(host: str) -> str:
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
    host = normal(text)
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
    if text.startswith("*.") and _is_address(normal(text[2:])):
        raise ValueError(f"{text!r} matches nothing: an address has no names below it")


def matches(host: str, patterns: Collection[str]) -> bool:
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
