"""Structured pruning of transformers by variational-information-bottleneck masks."""

__version__ = "0.1.0"
