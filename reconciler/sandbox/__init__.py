"""
Runs one untrusted child process: no network, no writing, bounded memory and time.

``choose`` finds a sandbox that works on this machine, by running ``probe`` inside it. ``process`` starts a child in that sandbox,
``supervision`` feeds, watches and ends the child, and ``confine`` is what the child does to itself before it runs its job.
"""
