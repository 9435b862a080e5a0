"""PREPARE: options -> a run that was checked before any weight is read."""
