"""Children that run in a sandbox as a test job does, and each misbehave in one way. They import the standard library alone."""
