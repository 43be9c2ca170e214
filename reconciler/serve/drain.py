"""
Waits until a reload cuts nobody's request.

Rules that hold here:

1. Only a server that can tell is asked: llama-server by its slots, vLLM by its metrics (the option ``metrics`` of its table). The command
   that reloads any other is told to take care of it in the manual.
2. The wait ends at the server's ``drain``: a client that never stops asking holds back no update for longer.
3. Where the answer cannot be understood, nothing is reloaded (``ServeFailed``): no answer is not idleness. A server that nothing listens
   for serves nobody.
4. ``drain = "0s"`` asks nothing.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection
from typing import Any, Literal
from urllib.parse import quote

import msgspec

from reconciler.core.errors import ServeFailed
from reconciler.serve import client, llama_server
from reconciler.serve.content import Content, Server

#: What was seen: a request would be cut, or is none at the moment; or there is nobody whom a reload could cut off.
Activity = Literal["busy", "idle", "nobody"]

_SECONDS = 10.0
_PAUSE_SECONDS = 0.005
_RECENT_SECONDS = 0.01
#: A server that had nothing to do for so long is taken for idle.
_QUIET_SECONDS = 0.25
_HINT = 'look at the server, or write `drain = "0s"` in its [[serve]] table to reload it without a look'


def wait(server: Server, ask: Callable[[], Activity], sleep: Callable[[float], None] = time.sleep) -> bool:
    """
    Wait for a moment in which nobody is served, or the server is idle and a request is least likely to come: one has just ended, or none
    came for a while. Return whether it came within the server's ``drain``.

    A client that asks, pauses and asks again is met at the begin of its pause.

    Raises:
        ServeFailed: whether it is busy cannot be learned.
    """
    began, idle_since, was_busy = time.monotonic(), math.inf, False
    while True:
        asked = time.monotonic()
        seen, now = ask(), time.monotonic()
        if seen == "nobody":
            return True
        is_idle = seen == "idle"
        # An answer that took long tells of a moment that has passed; where all take long, that must do after a while.
        is_recent = now - asked < _RECENT_SECONDS + (now - began) / 100
        if is_idle and ((was_busy and is_recent) or now - idle_since >= _QUIET_SECONDS):
            return True
        if now - began >= server.drain_seconds:
            return is_idle
        idle_since, was_busy = min(idle_since, now) if is_idle else math.inf, not is_idle
        sleep(_PAUSE_SECONDS)


def activity_of_llama_server(base: str, changed: Callable[[str], bool]) -> Activity:
    """
    Return what llama-server at *base* does with the models whose sections *changed*. One that it loads is busy: somebody waits for it.

    Raises:
        ServeFailed: it does not tell.
    """
    try:
        found = _json("GET", f"{base}/models")
    except client.Unreachable:
        return "nobody"
    states = {str(model["id"]): str(model["status"]["value"]) for model in _models(found)}
    concerned = {name: state for name, state in states.items() if state in {"loading", "loaded"} and changed(name)}
    if not concerned:
        return "nobody"
    return "busy" if "loading" in concerned.values() or any(_has_work(base, name) for name in concerned) else "idle"


def _models(found: Any) -> list[dict[str, Any]]:
    models = found.get("data") if isinstance(found, dict) else None
    if not isinstance(models, list) or not all(isinstance(one, dict) and isinstance(one.get("status"), dict) for one in models):
        raise ServeFailed("its list of models has no states: it is no llama-server in router mode", hint=_HINT)
    return models


def _has_work(base: str, name: str) -> bool:
    slots = _json("GET", f"{base}/slots?model={quote(name, safe='')}&autoload=false")
    if not isinstance(slots, list) or not all(isinstance(slot, dict) and isinstance(slot.get("is_processing"), bool) for slot in slots):
        raise ServeFailed(f"the slots of {name} do not say whether they work", hint=_HINT)
    return any(slot["is_processing"] for slot in slots)


def _json(method: str, url: str) -> Any:
    body = client.request(method, url, seconds=_SECONDS).body_or_raise(url)
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        raise ServeFailed(f"{url} does not answer in JSON", hint=_HINT) from None


_VLLM = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}\n]*\})?\s+([0-9.eE+-]+)", re.MULTILINE)


def activity_of_vllm(url: str) -> Activity:
    """
    Return whether vLLM, whose metrics are at *url*, works on a request or has one waiting.

    Raises:
        ServeFailed: it does not tell.
    """
    try:
        text = client.request("GET", url, seconds=_SECONDS).body_or_raise(url).decode(errors="replace")
    except client.Unreachable:
        return "nobody"
    found = _VLLM.findall(text)
    if not found:
        raise ServeFailed(f"{url} has no vllm:num_requests_running", hint=_HINT)
    return "busy" if any(float(number) > 0 for number in found) else "idle"


def changed_sections(before: dict[str, str], after: dict[str, str], *, is_known: bool) -> Callable[[str], bool]:
    """
    Return a function that says whether a reload unloads the section of a name.

    *before* is what llama-server read last; where that is not *known*, as after a reload that failed, all that runs counts as changed.
    """
    same: Collection[str] = {name for name, body in after.items() if before.get(name) == body} if is_known else ()
    known = before.keys() | after.keys()
    return lambda name: name not in same and (not is_known or name in known)


# -- which server is asked what ---------------------------------------------------------------------


def question(server: Server, content: Content, *, is_known: bool) -> Callable[[], Activity] | None:
    """
    Return what looks whether a reload of *server* would cut a request; None where it cannot tell, or is not to be asked.

    *is_known*: what it read last is what its file holds, so that this is asked for before *content* is written.
    """
    if not server.drain_seconds or not server.reload:
        return None
    if server.kind == "llama-server" and isinstance(server.reload, str) and server.path is not None:
        base, changed = client.base_of(server.reload), _changes(server, content, is_known=is_known)
        return lambda: activity_of_llama_server(base, changed)
    metrics = server.options.get("metrics")
    if server.kind in {"hf-cache", "command", "http"} and isinstance(metrics, str):
        return lambda: activity_of_vllm(metrics)
    return None


def _changes(server: Server, content: Content, *, is_known: bool) -> Callable[[str], bool]:
    assert server.path is not None
    try:
        before = llama_server.sections(server.path.read_text())
    except (OSError, ValueError):
        before, is_known = {}, False
    after = llama_server.sections(content.entries[0].data.decode())
    return changed_sections(before, after, is_known=is_known)
