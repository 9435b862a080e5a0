"""The default model: a tiny LLaMA pretrained by this project on the text every Python carries.

It lets every command run without downloads. `corpus` holds the text, `pretrain`
reproduces the checkpoint.
"""

from pathlib import Path

EMBEDDED_MODEL: Path = Path(__file__).parent / "model"
"""Folder of the checkpoint and its tokenizer, loadable with `AutoModelForCausalLM`."""
