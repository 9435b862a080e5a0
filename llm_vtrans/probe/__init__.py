"""PROBE: what the dense model's heads look at, kept heads against pruned ones (METHOD, 10)."""
