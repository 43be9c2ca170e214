"""
The entry point of ``reconcile``, ``python -m reconciler`` and ``python cli.py``.

Importing the command line takes a twentieth of a second, in which Python would answer an interrupt with a traceback. Until the command
line handles interrupts itself, SIGINT therefore has its default action and ends the process silently.
"""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Import the command line, run it, and exit with its code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it stays ignored in a shell's background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from reconciler import cli

    cli.main()


if __name__ == "__main__":
    main()
