"""
Memory twins of the ports, one module for each family of them.

``tests/contract`` runs one suite against each twin and the adapter that it stands for.
"""
