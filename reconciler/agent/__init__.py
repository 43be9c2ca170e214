"""
The unattended service: sync, re-hash a share of the store, report, wait, repeat.

Start with ``loop``. ``signals`` and ``systemd`` connect it to the service manager; ``scrub`` chooses what is hashed again.
"""
