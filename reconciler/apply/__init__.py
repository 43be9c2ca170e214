"""
Carries out a plan. Knows ports only, never an adapter.

Start with ``run``: its numbered steps are the order of effects, which is the safety proof. Each step takes the run as a value
(``run_state``) and returns the next one. ``prepare`` turns blobs into tested trees, ``install`` judges them, ``activate`` is the one swap
of the active set, ``retire`` is what leaves, and ``records`` is what is remembered of each model.
"""
