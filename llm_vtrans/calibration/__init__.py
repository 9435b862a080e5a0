"""CALIBRATE: text -> windows of tokens to learn from."""
