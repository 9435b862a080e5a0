"""What users call beside `prune` and `score`, and how every command ends."""
