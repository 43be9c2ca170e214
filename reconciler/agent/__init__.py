"""
The unattended service: sync, re-hash a share of the store, report, wait, repeat.

Start with ``loop``. ``cycle`` holds the steps of one cycle; ``service`` connects the agent to signals, systemd and the health file.
"""
