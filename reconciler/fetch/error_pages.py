"""
Recognises what stands where a document or a blob was asked for: a login page, a proxy's error page, a bucket's or a registry's refusal.

Rules that hold here, none of which touches the network:

1. What is meant as an envelope is judged by its signatures and by nothing else: a JSON object with one of an envelope's members, whole or
   cut off, and under whatever content type, is never called a page.
2. All else is described for people: its kind, and a short quote without control characters, tags or line breaks.
3. A page is the fault of the network on the way and not of who is asked: it is no wrong bytes, and no bad signature.
"""

from __future__ import annotations

import html
import json
import re
from typing import Any

from reconciler.fetch import sources

#: Of a page, so many bytes are looked at.
MOST_BYTES = 64 << 10
_QUOTE_CHARACTERS = 160
_MEMBER = re.compile(rb'"(?:payload|payloadType|signatures)"\s*:')
_HTML = re.compile(r"\s*(?>(?:<!--.*?-->\s*)*)<(?:!doctype\s+html|html|head|body|title|script|meta|center|h1)\b", re.IGNORECASE | re.DOTALL)
_TITLE = re.compile(r"<(title|h1)\b[^>]{0,200}>(.{0,1000}?)</\1\s*>", re.IGNORECASE | re.DOTALL)
_HIDDEN = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)|<[^>]*>?", re.IGNORECASE | re.DOTALL)
#: Members in which services put what went wrong (RFC 9457; OCI distribution, error codes; object stores).
_JSON_TEXTS = ("code", "error", "message", "detail", "title", "reason", "error_description", "errors")


def is_meant_as_envelope(data: bytes) -> bool:
    """Whether *data* is a JSON object with a member of an envelope, also where it is malformed."""
    body = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not body.startswith(b"{"):
        return False
    found = _parsed(body)
    return bool(found.keys() & {"payload", "payloadType", "signatures"}) if isinstance(found, dict) else bool(_MEMBER.search(body))


def describe_non_envelope(content_type: str, data: bytes) -> str:
    """Return what *data* is, where it is not meant as an envelope; empty: it is, or nobody can tell."""
    if is_meant_as_envelope(data):
        return ""
    if not data.strip():
        return "nothing: an empty page"
    is_object = data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    return describe(content_type, data) or ("" if is_object else f"what is no JSON object{_quoted(_text(data))}: a proxy, or another file?")


def describe(content_type: str, data: bytes) -> str:
    """Return what page *data* is, with a quote from it, as in ``a web page ("Sign in"): a login page or a proxy?``; empty: no page."""
    text = _text(data)
    kind = content_type.partition(";")[0].strip().lower()
    if _HTML.match(text) or (kind in {"text/html", "application/xhtml+xml"} and not text.lstrip().startswith(("{", "["))):
        title = _TITLE.search(text)
        return f"a web page{_quoted(_visible(title[2] if title else text))}: a login page or a proxy?"
    if text.lstrip().startswith("<"):
        return f"an XML page{_quoted(_visible(_xml_parts(text)))}: a bucket's refusal or a proxy?"
    said = _json_texts(_parsed(data)) if text.lstrip().startswith("{") else []
    return f"an error of the service{_quoted('; '.join(said))}" if said else ""


def _text(data: bytes) -> str:
    return data[:MOST_BYTES].decode("utf-8", "replace").removeprefix("\ufeff")


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _json_texts(found: Any, depth: int = 3) -> list[str]:
    """Return what the members that name an error say, the first of each."""
    if isinstance(found, str | int) and not isinstance(found, bool):
        return [str(found)]
    if isinstance(found, list):
        return _json_texts(found[0], depth) if found else []
    if not isinstance(found, dict) or not depth:
        return []
    texts = [text for name in _JSON_TEXTS if name in found for text in _json_texts(found[name], depth - 1)]
    is_error = bool(found.keys() & {"error", "errors", "message", "detail"}) or {"code", "title"} <= found.keys()
    return list(dict.fromkeys(texts)) if is_error else []


def _xml_parts(text: str) -> str:
    """Return the code and the message of an object store's error, else the whole text."""
    parts = [found[1] for name in ("Code", "Message") if (found := re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL))]
    return ": ".join(parts) or text


def _visible(markup: str) -> str:
    return html.unescape(_HIDDEN.sub(" ", markup))


def _quoted(text: str) -> str:
    shown = sources.clean(" ".join(text.split()), _QUOTE_CHARACTERS)
    return f' ("{shown}")' if shown else ""
