"""Children that run in a cell as a test job would, and misbehave each in one way. They import nothing but the standard library."""
