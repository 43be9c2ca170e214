"""
Step 6: the active set, and its one door.

Every change of what serves is one swap of the whole set. Where something was added, the operator's command is asked about it; where
the node is not healthy with it, what served before is swapped in again.
"""

from __future__ import annotations

from collections.abc import Collection

from reconciler.ports import Incident, Ports, Swapped
from reconciler.state import ActiveModel, Generation


class Serving:
    """The models that serve, by id."""

    def __init__(self, active: Generation, ports: Ports) -> None:
        self._ports = ports
        self.entries = dict(active.entries)

    def swap(
        self, added: dict[str, ActiveModel], gone: Collection[str], what: str, *, succeeded: Collection[str] = (), anew: bool = False
    ) -> str:
        """
        Swap in the set with *added* and without *gone* and *succeeded*; return why the node was not healthy with it, or nothing.

        Then what *succeeded* names serves on: it left only for what was added. The same set is swapped in only if it must be made *anew*.
        """
        left = {*gone, *succeeded}
        following = {model: entry for model, entry in (self.entries | added).items() if model not in left}
        if following == self.entries and not anew:
            return ""
        before = self._ports.generations.current()
        made = self._ports.generations.swap(following)
        why = self._ports.gate.healthy(made) if added else ""
        if why:
            self._go_back(before, made, set(gone), why)
            return why
        self._announce(made, tuple(sorted(added)), tuple(sorted(left & self.entries.keys())), what)
        self.entries = following
        return ""

    def _go_back(self, before: Generation, made: Generation, gone: set[str], why: str) -> None:
        """Return to what served before; what may not serve any more stays out of it."""
        self._ports.report(Incident(kind="smoke-failed", detail=f"generation {made.number} is not healthy: {why}"))
        rest = {model: entry for model, entry in before.entries.items() if model not in gone}
        whole = before.number and rest == before.entries
        back = self._ports.generations.reactivate(before.number) if whole else self._ports.generations.swap(rest)
        self._announce(back, (), (), f"went back: not healthy: {why}")
        self.entries = dict(back.entries)

    def _announce(self, made: Generation, added: tuple[str, ...], removed: tuple[str, ...], what: str) -> None:
        self._ports.report(Swapped(generation=made.number, added=added, removed=removed, what=what))
        self._ports.gate.activated(made)
