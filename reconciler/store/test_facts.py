"""
Facts of the ledger about test jobs, beside the last report on each model: tests that could not be made, and servers that have served.

Rules that hold here:

1. A report on a test that could not be made replaces no report on one that was: that one still counts.
2. A server's command line is known by its digest, and what it has served by the digests of the trees; the newest of them are kept.
"""

from __future__ import annotations

from datetime import datetime
from typing import Protocol, TypeVar

from reconciler.core.state import Passed
from reconciler.ports import TestReport

_UNTESTED, _SERVED = "untested/", "served/"
_MOST_SERVED = 16
_T = TypeVar("_T")


class Facts(Protocol):
    """Facts by key, as the ledger keeps them."""

    def fact(self, key: str, kind: type[_T]) -> _T | None:
        """Return the fact *key*, or None."""
        ...

    def set_fact(self, key: str, value: object) -> None:
        """Store *value* as the fact *key*; None deletes it."""
        ...


def record(facts: Facts, model: str, report: TestReport, passed: Passed | None, at: datetime) -> bool:
    """Record what *report* says beside the last report on *model*; return whether it is one on a test that was made."""
    facts.set_fact(f"{_UNTESTED}{model}", (report, at) if report.verdict == "unable" else None)
    if passed and report.command and passed.tree not in (known := _served(facts, report.command)):
        facts.set_fact(f"{_SERVED}{report.command}", [*known, passed.tree][-_MOST_SERVED:])
    return report.verdict != "unable"


def forget(facts: Facts, model: str) -> None:
    """Forget why *model* could not be tested."""
    facts.set_fact(f"{_UNTESTED}{model}", None)


def untested(facts: Facts, model: str) -> tuple[TestReport, datetime] | None:
    """Return the report on *model*'s last test job, and when that was, if it could not be made; else None."""
    return facts.fact(f"{_UNTESTED}{model}", tuple[TestReport, datetime])


def served(facts: Facts, command: str) -> frozenset[str]:
    """Return the trees that a server's command line, by its digest, has served in test jobs on this node; the newest of them."""
    return frozenset(_served(facts, command))


def _served(facts: Facts, command: str) -> list[str]:
    return facts.fact(f"{_SERVED}{command}", list[str]) or []
