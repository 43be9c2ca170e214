"""
Carries out a plan. Knows ports only, never an adapter.

Start with ``run``: its numbered steps are the order of effects, which is the safety proof. ``prepare`` turns blobs into tested trees,
``activate`` is the one swap of the active set, and ``records`` remembers the state in which a run leaves each model.
"""
