"""What aria2's answers mean. Pure; whatever is malformed raises ``LookupError``, ``TypeError`` or ``ValueError``."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from reconciler.fetch import sources
from reconciler.fetch.sources import Failure


class Status(Struct, frozen=True, kw_only=True):
    """What aria2 says of a transfer; *prefix* is how many bytes from the front are in the file for good."""

    gid: str
    state: str
    total: int
    done: int
    speed: int
    prefix: int
    bitfield: str = ""
    error: int = 0
    text: str = ""


class Ending(Struct, frozen=True, kw_only=True):
    """What the end of a transfer means. *discard*: what is on the disk cannot be continued. *node*: this machine is at fault."""

    failure: Failure
    discard: bool = False
    node: bool = False


def status(answer: Mapping[str, str]) -> Status:
    """Return what a tellStatus *answer* says."""
    total, done = int(answer["totalLength"]), int(answer["completedLength"])
    bitfield = answer.get("bitfield", "")
    known = prefix(bitfield, int(answer.get("pieceLength", "0")), total) if total else 0
    return Status(
        gid=answer["gid"], state=answer["status"], total=total, done=done, speed=int(answer.get("downloadSpeed", "0")), prefix=known,
        bitfield=bitfield, error=int(answer.get("errorCode", "0") or 0), text=answer.get("errorMessage", ""),
    )  # fmt: skip


def prefix(bitfield: str, piece: int, total: int) -> int:
    """Return the bytes that the unbroken run of set bits at the front stands for; the highest bit of the first digit is piece 0."""
    rest = bitfield.lstrip("f")
    pieces = 4 * (len(bitfield) - len(rest))
    if rest:
        digit = int(rest[0], 16)
        pieces += next(index for index in range(4) if not digit & (8 >> index))
    return min(total, pieces * piece)


#: aria2's exit status by number, as far as it says more than "it failed": permanent, discard, node, text.
_ENDINGS = {
    2: (False, False, False, "it stopped answering"),
    3: (True, False, False, "it does not have the file"),
    4: (True, False, False, "it does not have the file"),
    5: (False, False, False, "it is too slow"),
    6: (False, False, False, "the network failed"),
    8: (False, True, False, "it cannot continue a download"),
    9: (True, True, True, "the disk is full"),
    10: (False, True, False, "what is on the disk does not fit"),
    13: (False, True, False, "what is on the disk does not fit"),
    15: (True, True, True, "the file in staging cannot be opened"),
    16: (True, True, True, "the file in staging cannot be made"),
    17: (True, True, True, "the file in staging cannot be written"),
    18: (True, True, True, "the folder in staging cannot be made"),
    19: (False, False, False, "its host's name leads to no address"),
    21: (False, False, False, "its answer is malformed"),
    22: (False, False, False, "its answer was not expected"),
    23: (True, False, False, "it redirects in a circle"),
    24: (True, False, False, "it asks for credentials that this node does not have"),
    29: (False, False, False, "it is overloaded"),
}


def ending(code: int, text: str) -> Ending:
    """Return what aria2's error *code* and *text* mean. A refusal here may be a URL that expired since it was resolved: not permanent."""
    permanent, discard, node, said = _ENDINGS.get(code, (False, False, False, "the transfer failed"))
    # Its text may hold the whole URL, with a signed query.
    detail = sources.clean(" ".join(word for word in text.split() if "://" not in word), 120)
    kind: sources.Kind = "disk-full" if code == 9 else "source-failed"
    shown = f"{said} ({detail})" if detail else said
    return Ending(failure=Failure(text=shown, permanent=permanent, kind=kind), discard=discard, node=node)
