"""The stage graph: declarations, fingerprints, plans, artifacts and executors. Imports no torch."""
