"""
What a network's operator learns of many nodes: signed statuses that nodes send, and the report that is made of them.

``statement`` is what is signed; ``public_text``, ``outbox`` and ``delivery`` are the node's side; ``register``, ``collect``, ``assess`` and
``page`` the operator's.
"""
