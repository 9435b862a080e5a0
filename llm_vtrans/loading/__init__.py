"""LOAD: checkpoint folder -> frozen model, whole, quantised or of a pruned shape."""
