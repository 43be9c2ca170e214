"""
Where models are added from: a hub, a registry, a bucket, a folder. Each module lists the files of one source, pinned to exact bytes, as
``listing`` describes them.

Rules that hold here:

1. A name that can move (a branch, a tag) is resolved once, to a commit or a digest, and what is written names that.
2. What nodes are told to fetch is a plain https address, or ``s3://BUCKET/KEY``: no token, no signature, no name that can move.
3. The network is asked through functions that the caller gives, or a client library of the source; nothing here opens a connection.
"""
