"""CONVERT: pruned checkpoints in the formats of other runtimes."""
