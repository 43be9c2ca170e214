"""
The life of a model: from what is observed and what is wanted to what is done.

Rules that hold here:

1. The table is total: every pair has an answer, and a test counts them.
2. It decides, nothing else does: ``plan`` finds out which row and column a model is in, ``apply`` does what the cell says.

The states are the network's (pending, active, inactive, failed, archived) and ``absent``. Rows tell apart what a state alone does
not: an active model whose listed content is another (``outdated``), whose test is no longer good (``due``), or a copy that is not
intact (``damaged``).
"""

from __future__ import annotations

from typing import Literal

Observed = Literal["absent", "pending", "active", "outdated", "due", "damaged", "inactive", "failed", "archived"]
Desired = Literal["enabled", "disabled", "archived", "unlisted", "incompatible"]
Op = Literal["install", "repair", "retest", "enable", "disable", "archive", "restore", "remove", "reject", "keep"]

OPS: tuple[Op, ...] = ("install", "repair", "retest", "enable", "disable", "archive", "restore", "remove", "reject", "keep")
OBSERVED: tuple[Observed, ...] = ("absent", "pending", "active", "outdated", "due", "damaged", "inactive", "failed", "archived")
DESIRED: tuple[Desired, ...] = ("enabled", "disabled", "archived", "unlisted", "incompatible")

#: What is done, by what is observed (rows) and what is wanted (columns, in the order of ``DESIRED``).
TABLE: dict[Observed, tuple[Op, Op, Op, Op, Op]] = {
    #            enabled    disabled   archived   unlisted  incompatible
    "absent":   ("install", "keep",    "keep",    "keep",   "reject"),
    "pending":  ("retest",  "disable", "archive", "remove", "reject"),
    "active":   ("keep",    "disable", "archive", "remove", "keep"),  # what serves goes on: only the network takes it away
    "outdated": ("install", "disable", "archive", "remove", "reject"),
    "due":      ("retest",  "disable", "archive", "remove", "keep"),
    "damaged":  ("repair",  "repair",  "remove",  "remove", "reject"),
    "inactive": ("enable",  "keep",    "archive", "remove", "reject"),
    "failed":   ("install", "keep",    "remove",  "remove", "reject"),
    "archived": ("restore", "restore", "keep",    "remove", "reject"),
}  # fmt: skip

#: The first word of every reason, and what it says to people.
REASONS = {
    "up-to-date": "nothing to do",
    "not-installed": "listed, and not on this node yet",
    "not-listed": "the snapshot does not list it any more",
    "content-changed": "the snapshot lists other content under this id",
    "disabled-by-snapshot": "the network disabled it",
    "enabled-by-snapshot": "the network enabled it",
    "archived-by-snapshot": "the network archived it",
    "listed-again": "the network lists it again",
    "not-tested": "no test job has passed on this node",
    "test-changed": "the network asks for another test job",
    "index-changed": "the index does not say of it what the snapshot says",
    "runtime-changed": "the engine's version is another than when it was tested",
    "device-changed": "the device is another than when it was tested",
    "retest-due": "its last test is older than the network allows",
    "unverified": "its bytes are not known to be good and are hashed again",
    "failed-before": "the last try failed",
    "damaged": "its bytes on disk are not what they were",
    "incompatible": "this node cannot run it",
    "excluded": "left out on the command line",
}


def decide(observed: Observed, desired: Desired) -> Op:
    """Return what is done with a model that is *observed* so and *desired* so."""
    return TABLE[observed][DESIRED.index(desired)]


def reason(word: str, detail: str = "") -> str:
    """Return a reason: a word of the closed list, and more for people."""
    return f"{word}: {detail or REASONS[word]}"
