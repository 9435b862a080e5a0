"""Scripts that score, compare and measure; the repository's root must be on `sys.path`."""
