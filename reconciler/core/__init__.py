"""
Values and rules. Nothing here reads a clock, a file, a socket or another process.

Start with ``snapshot`` (what the network signs), then follow the path of data: ``trust`` verifies it, ``lock`` compiles it, ``state``
is what a node holds, ``lifecycle`` is the table that decides, and ``plan`` applies that table to every model.
"""
