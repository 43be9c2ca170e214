"""
The door: ``reconcile``, ``python -m reconciler`` and ``python cli.py`` come in here.

Python turns an interrupt into a traceback until somebody catches it, and the command line takes a twentieth of a second to import: so
until it can answer, an interrupt ends the process as it ends any program that never heard of it.
"""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Import the command line, run it, and exit with its code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in a shell's background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from reconciler import cli

    cli.main()


if __name__ == "__main__":
    main()
