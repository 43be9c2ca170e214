"""
Servers that follow the active set: what each of them reads is written, then it is told.

Start with ``follow``: for each configured server it writes, waits, tells, and records what the server has then. One module a kind
(``kinds`` lists them) turns models into what that server reads; none of them writes, or asks anything. ``content`` holds that as a value,
and writes it; ``drain`` waits until nobody's request would be cut; ``reload`` tells the server.
"""
