"""EXPORT: plan + original shards -> smaller shards that stock classes load."""
