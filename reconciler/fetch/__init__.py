"""
Downloads blobs into staging, and signed documents into memory. Nothing that a server, a downloader or a file's size says counts as
evidence: the digest decides.

``sources`` and ``source_selection`` decide without I/O. ``resolver`` finds where a source leads, ``aria2_daemon`` downloads, ``hashing``
hashes, ``staging`` keeps the files. ``transfer`` is one blob's way through these, and ``downloader`` drives all of them.
``http`` holds the connections and fetches documents.
"""
