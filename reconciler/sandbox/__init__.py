"""
Runs one untrusted child process: no network, no writing, bounded memory and time.

Start with ``choose``, which finds a sandbox that works here by attacking it (``probe``). ``process`` starts a child inside it,
``supervision`` feeds, watches and ends the child, and ``confine`` is what the child does to itself before it runs its job.
"""
