"""BUDGET: what a network of a shape costs, and how training and allocation are held to it."""
