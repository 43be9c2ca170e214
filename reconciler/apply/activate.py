"""
Step 6: the active set, and its one door.

Every change of what serves is one swap of the whole set. Where something was added, the operator's command is asked about it; where
the node is not healthy with it, what served before is swapped in again.
"""

from __future__ import annotations

from collections.abc import Collection

from reconciler.core.state import ActiveModel, Generation
from reconciler.ports import Incident, Ports, Swapped

#: Why a set is swapped in though the models that serve stay the same.
NOT_WHOLE = "what was active was not whole"


class ActiveSet:
    """The models that serve, by id."""

    def __init__(self, active: Generation, ports: Ports, *, broken: bool = False) -> None:
        self._ports = ports
        self._broken = broken
        self.entries = dict(active.entries)

    def mend(self) -> None:
        """Leave no reader with a set that is not whole."""
        if self._broken:
            self.swap({}, (), NOT_WHOLE, anew=True)

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
        self._broken = False
        why = self._ports.hooks.healthy(made) if added else ""
        if why:
            self._go_back(before, made, set(gone), why)
            return why
        self._announce(made, tuple(sorted(added)), tuple(sorted(left & self.entries.keys())), what)
        self.entries = following
        return ""

    def catch_up(self, heard: Generation, succeeded: Collection[str]) -> tuple[set[str], str]:
        """
        Ask about what was swapped in since *heard*, where a run was cut short before it asked.

        Return the models that were added, and why the node is not healthy with them, or nothing. If it is not, what they took the place of
        serves again, and what *succeeded* names.
        """
        added = {model for model, entry in self.entries.items() if heard.tree_of(model) != entry.tree}
        current = self._ports.generations.current()
        why = self._ports.hooks.healthy(current) if added else ""
        if why:
            returning = {model: entry for model, entry in heard.entries.items() if model in added or model in succeeded}
            kept = {model: entry for model, entry in self.entries.items() if model not in added}
            self._go_back(Generation(entries=kept | returning), current, set(), why)
        else:
            removed = heard.entries.keys() - self.entries.keys()
            self._announce(current, tuple(sorted(added)), tuple(sorted(removed)), "swapped in by a run that was cut short")
        return added, why

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
        self._ports.hooks.activated(made)
