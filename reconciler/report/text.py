"""Values and events as sentences for people. What came from a server is escaped: it cannot forge a line or a colour."""

from __future__ import annotations

from reconciler.core import units
from reconciler.ports import BlobReady, Event, FetchProgress, Incident, ModelDone, ModelPhase, Notice, RunEnded, RunStarted, Swapped

#: Two columns of state names read best with one mark each; colour is never the only sign.
MARKS = {"active": "●", "inactive": "○", "pending": "◌", "failed": "✗", "archived": "▪", "absent": "·"}
STYLES = {"active": "green", "inactive": "dim", "pending": "yellow", "failed": "bold red", "archived": "blue", "absent": "dim"}


def plain(text: str) -> str:
    """Return *text* on one line with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(name: str) -> str:
    """Return a digest's beginning, enough for the eye."""
    algorithm, _, digits = name.partition(":")
    return f"{algorithm}:{digits[:12]}…" if digits else name


def sentence(event: Event) -> str:
    """Return *event* as one line."""
    match event:
        case RunStarted():
            models = units.count(event.models, "model")
            return f"applying lock {short(event.lock)}: {models}, {units.human_size(event.download_bytes)} to download"
        case FetchProgress():
            return f"{short(event.digest)}: {units.human_size(event.done)} of {units.human_size(event.total)}"
        case BlobReady():
            return f"verified {short(event.digest)}, {units.human_size(event.size)}{_from(event.sources)}"
        case ModelPhase():
            return f"{event.model}: {event.phase}{': ' + plain(event.detail) if event.detail else ''}"
        case ModelDone():
            return f"{event.model}: {event.state} ({plain(event.reason)})"
        case Swapped():
            return f"generation {event.generation}:{_signed('+', event.added)}{_signed('-', event.removed)} ({plain(event.what)})"
        case Incident():
            about = " ".join(part for part in (event.model, short(event.blob), event.source) if part)
            return f"incident {event.kind}: {plain(about)}{': ' if about else ''}{plain(event.detail)}"
        case Notice():
            return plain(event.text)
        case RunEnded():
            failed = f", {event.failed} failed" if event.failed else ""
            done = "done" if event.changed else "nothing to do"
            return f"{done}: {event.active} active{failed}, generation {event.generation}, {units.human_time(event.seconds)}"
        case _:
            raise AssertionError(event)


def _from(sources: tuple[str, ...]) -> str:
    return f" from {', '.join(plain(source) for source in sources)}" if sources else ""


def _signed(sign: str, models: tuple[str, ...]) -> str:
    return "".join(f" {sign}{model}" for model in models)
