"""
``python cli.py plan`` runs the command line from a checkout. This is a good file to start reading at.

The commands are defined in ``reconciler/cli/``: ``node.py`` (init, lock, plan, apply, sync, agent, status), ``maintenance.py`` (verify,
gc, rollback, history, incidents, retry, doctor, trust, demo), ``operator.py`` (key, root) and ``snapshots.py`` (snapshot). Each calls a
function of ``reconciler/commands/``, which connects the values and rules of ``reconciler/core/`` to the store, the downloads and the
engines.
"""

from reconciler.__main__ import main

if __name__ == "__main__":
    main()
