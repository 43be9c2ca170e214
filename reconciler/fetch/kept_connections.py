"""
Connections that stay open between the small documents of one run: newer roots, the snapshot, a registry's manifest.

Rules that hold here:

1. A connection is kept where its answer was read to the end and the server agrees to keep it. Any other one is closed.
2. Whoever takes one may find it closed by the server meanwhile, and asks once more over a new one.
3. It is of one run and of one thread: the addresses that it leads to were checked for this run (``http``, rule 1).
"""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Hashable
from typing import Generic, TypeVar

C = TypeVar("C", bound=http.client.HTTPConnection)
#: What is left of an answer and still read, so that its connection can be kept.
_DRAIN_BYTES = 64 << 10
_DRAIN_SECONDS = 0.2


class KeptConnections(Generic[C]):
    """Open connections by where they lead, one each."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, C] = {}

    def take(self, place: Hashable) -> C | None:
        """Return the open connection to *place*, which is the caller's from then on; None where there is none."""
        return self._kept.pop(place, None)

    def keep(self, place: Hashable, connection: C, answer: http.client.HTTPResponse) -> bool:
        """Keep *connection*, of which *answer* was the last, for the next document from *place*; return whether it was kept."""
        if connection.sock is None or place in self._kept or not self._is_read(connection, answer):
            return False
        self._kept[place] = connection
        return True

    def _is_read(self, connection: C, answer: http.client.HTTPResponse) -> bool:
        """Return whether nothing is left of *answer*, after one look at what came in already: the page of a refusal, say."""
        left = answer.length
        if answer.isclosed() or left is None:
            return answer.isclosed()
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.sock.settimeout(_DRAIN_SECONDS)
            if left <= _DRAIN_BYTES:
                answer.read1(left)
            if answer.length == 0:
                answer.read()  # of nothing: it counts as read from then on
        return answer.isclosed()

    def close(self) -> None:
        """Close all of them."""
        while self._kept:
            self._kept.popitem()[1].close()
