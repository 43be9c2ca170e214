"""
What people and programs are shown: each module here is a reader of the same values and events, and decides nothing.

Start with ``events`` (events as sentences and as JSON) and ``terminal`` (tables and progress). ``log_lines`` is for the agent, ``metrics``
for Prometheus, ``page`` for a browser, ``markdown`` for pull requests, ``cyclonedx`` for inventories.
"""
