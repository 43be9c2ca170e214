"""
The store: everything that this program keeps on the node's disk.

Start with ``layout`` (where each thing lies) and ``observe`` (what is there, as a value). ``blobs``, ``trees`` and ``generations`` write
what is served; ``ledger`` and ``trust_state`` remember; ``housekeeping`` clears up and deletes. All durable changes go through ``atomic``.
"""
