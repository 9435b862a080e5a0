"""RECORD: what a run tells, writes beside the weights, and how that is verified."""
