"""RECOVER: the exported network learns from the dense one."""
