"""
Extracts untrusted archives to plain files.

Start with ``in_sandbox``, which runs ``extract`` in a child process. ``tar_reader`` and ``zip_reader`` are deliberately minimal
readers; ``decompress`` bounds memory. Which names and sizes a member may have is decided in ``core.archive_rules``.
"""
