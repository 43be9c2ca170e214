"""
Bytes from anywhere into staging, believed by nobody before they were hashed.

``sources`` and ``course`` decide (pure); ``resolve`` asks servers, ``aria2`` transfers, ``verify`` hashes, ``staging`` keeps the files;
``fetcher`` joins them. What a server, a downloader or a file's size says is a hint; the digest alone decides.
"""
