"""Structured pruning of transformers by variational-information-bottleneck masks.

Importing the package makes checkpoints in the per-layer layout loadable by
`AutoModelForCausalLM` without `trust_remote_code`.
"""

from llm_vtrans.per_layer_modeling import register as _register

__version__ = "0.1.0"

_register()
