"""
One function for each thing that a person can ask of a node, and the values and adapters that they need.

``context`` turns settings into values and holds the store; ``documents`` reads signed documents; ``node_trust`` is what the node trusts;
``lock`` fetches a snapshot and writes ``models.lock``; ``load_lock`` verifies the committed lock; ``wiring`` connects adapters to ports;
``apply`` is plan, apply and sync; ``status`` reads; ``verify`` hashes; ``maintenance`` is gc and retry; ``rollback`` returns to an earlier
set; ``doctor`` checks.
Only this package and ``agent`` know adapters; each is imported when it is used, so that a plan loads no downloader and no engine.
"""
