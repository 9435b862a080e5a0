"""The machinery of `eval/compare.py`: cells, the method itself as one of them, tables and plots."""
