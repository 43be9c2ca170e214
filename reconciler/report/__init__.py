"""What people and programs are shown: each module here is a reader of the same values and events, and decides nothing."""
