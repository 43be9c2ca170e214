"""
Servers that follow the active set: what each of them reads is written, then it is told.

One module a kind turns models into what that server reads (``Content``); none of them writes, or asks anything. ``write`` writes,
``drain`` waits until nobody's request would be cut, ``reload`` tells the server, and ``follow`` does the three in this order for each
configured server, and records what each has then.
"""
