"""For the network's operators: keys, trust roots and snapshots."""
