"""MASK: what multiplies a network's activations, and where it is hooked on."""
