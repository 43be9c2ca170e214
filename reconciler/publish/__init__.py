"""
For the network's operators: keys, trust roots and snapshots.

Start with ``snapshots`` (models are added and removed) and ``envelopes`` (a document that several people sign, one after the other).
``signable`` says what must not be signed, and ``lint`` what probably should not; ``contents`` and ``differences`` show what is. ``keys``,
``pkcs11_token`` and ``external_signer`` make signatures. ``sources`` is where models are added from.
"""
