"""
The node's disk: blobs, trees, generations, ledger.

``blobs/`` is the truth about bytes, ``active`` the truth about what serves. Everything that renames, links or syncs goes through
``durable``; everything that makes a path from a digest goes through ``layout``.
"""
