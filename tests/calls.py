"""Which calls were made, in their order."""

from __future__ import annotations

from collections.abc import Callable


def noting(done: list[str], name: str, real: Callable[..., object]) -> Callable[..., object]:
    """Return *real*, which adds its *name* to *done* when it is called."""

    def call(*given: object) -> object:
        done.append(name)
        return real(*given)

    return call
