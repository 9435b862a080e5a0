"""SCORE: perplexity, the LM Evaluation Harness, and what a run measures on its way."""
