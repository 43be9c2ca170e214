"""
Engines and the test jobs that they run, each in a child process inside a sandbox.

Rules that hold here:

1. A model file is hostile input: nothing in this process parses one, and the child that does has neither network nor other files.
2. Nothing runs without a sandbox. Where none works, models stay pending.
3. A child's answer counts only with the job's nonce; otherwise the way in which it ended decides.

Start with ``smoke_test``, which runs a test job; ``engines`` says which child program does that for each engine.
"""
