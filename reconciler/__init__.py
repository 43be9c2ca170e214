"""
The engine that decides which AI models an inference node holds, and makes it so.

The path of data, from end to end::

    envelope bytes --trust.verify--> Snapshot --lock.compile--> Lock --plan.diff--> Plan --apply.execute--> Outcome
"""

__version__ = "0.2.0"
