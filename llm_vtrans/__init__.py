"""Structured pruning of transformers by variational-information-bottleneck masks.

Importing the package makes checkpoints in the per-layer layout loadable by
`AutoModelForCausalLM` without `trust_remote_code`.
"""

from llm_vtrans import per_layer_modeling as per_layer_modeling

__version__ = "0.1.0"
