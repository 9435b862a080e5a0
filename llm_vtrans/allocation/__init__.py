"""ALLOCATE: trained masks and a budget -> exactly which units stay."""
