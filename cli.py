"""
Where a reader starts: ``python cli.py plan`` runs the command line from a checkout.

The commands are in ``reconciler/cli/``: ``node.py`` (init, lock, plan, apply, sync, agent, status), ``upkeep.py`` (verify, gc, rollback,
history, incidents, retry, doctor, trust, demo) and ``publish.py`` (key, root, snapshot). Each calls a function of
``reconciler/engine/``, which joins the pure core (trust, lock, plan) to the store, the downloader and the engines.
"""

from reconciler.__main__ import main

if __name__ == "__main__":
    main()
