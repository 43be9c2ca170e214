"""The network operator's side: keys, trust roots and snapshots, made and signed by people who may never meet."""
