"""Proxies: which one is on the way to a host, and how it is greeted."""

from __future__ import annotations

import base64
from urllib.parse import unquote, urlsplit

from reconciler.fetch import sources


def proxy_for(host: str, proxy: str, *, tls: bool) -> str:
    """Return the proxy on the way to *host*: *proxy*, else the environment's; none to this very machine."""
    if sources.is_loopback_name(host):
        return ""
    if proxy:
        return proxy
    from urllib import request

    found = request.getproxies().get("https" if tls else "http", "")
    if not found or request.proxy_bypass(host):
        return ""
    return found if "://" in found else f"http://{found}"


def headers(proxy: str) -> dict[str, str]:
    """Return the header with the proxy's credentials, where its URL has any."""
    parts = urlsplit(proxy)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}
