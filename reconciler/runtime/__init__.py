"""
Engines and the test jobs that they run, each in a child process inside a sandbox.

Rules that hold here:

1. A model file is hostile input: nothing in this process parses one, and the child that does can reach neither network nor files.
2. There is no way to run without a sandbox. Where none works, models stay pending.
3. A child's word counts only if it carries the job's nonce; how it died says the rest.
"""
