"""
The committed demo network: ``root.json``, ``snapshot.json`` and ``models.lock`` at the top of the repository.

Made once by ``python -m reconciler.demo.committed FOLDER``, valid to 2036; its private keys were never written anywhere. To change
the catalogue is to make a new network.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

from reconciler.core import lock as locks
from reconciler.core import trust
from reconciler.core.errors import StoreError
from reconciler.core.trust import TrustState
from reconciler.demo import catalogue, network
from reconciler.store import atomic

ISSUED = datetime(2026, 11, 20, tzinfo=UTC)
EXPIRES = datetime(2036, 11, 20, tzinfo=UTC)
FILES = ("root.json", "snapshot.json", "models.lock")


def folder() -> Path:
    """
    Return where the committed files lie: at the top of a checkout, or beside this module in an installed package.

    Raises:
        StoreError: they are nowhere.
    """
    for place in (Path(__file__).parents[2], Path(__file__).parent):
        if all((place / name).is_file() for name in FILES):
            return place
    raise StoreError("the demo network's files are not installed", hint="install the package again, or run from a checkout")


def main() -> None:
    """Make a new network and write its three files."""
    target = Path(sys.argv[1])
    made = network.make(catalogue.NETWORK, ISSUED, EXPIRES - ISSUED)
    models = tuple(item.model for item in catalogue.everything())
    envelope = network.snapshot(made, models, 1, ISSUED, EXPIRES - ISSUED)
    verified = trust.verify(envelope, trust.pin(made.root), now=datetime.now(UTC), trust_state=TrustState())
    for name, data in zip(FILES, (made.root, envelope, locks.encode(locks.compile(verified))), strict=True):
        atomic.write(target / name, data)


if __name__ == "__main__":
    main()
