"""OWN WORDS: texts that a causal language model writes, among the calibration text.

Calibration text never shows all that a model knows, and masks let go what they never see.
What the model says by itself, drawn at temperature one, stands for all that it has learnt
(self-calibration, arXiv:2410.17170; data-free distillation, LLM-QAT, arXiv:2305.17888,
section 2.1).
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from llm_vtrans.tasks.encoding import Examples

TEXT_LENGTH = 64  # a cache that is short costs little to carry along
NUM_TEXTS = 128  # written at once


def with_own_words(
    examples: Examples, share: float, model: PreTrainedModel, accelerator: Accelerator, seed: int
) -> Examples:
    """Examples of a causal LM, some of which give way to texts of its own.

    The ranks share the work, and all get the same texts, however many ranks there are.

    Args:
        examples: packed windows.
        share: of the windows, in [0, 1).
        model: on the accelerator's device.
        accelerator: the ranks.
        seed: of all draws.
    """
    windows = examples.tensors["input_ids"].clone()
    num, seq_len = round(share * len(windows)), windows.shape[1]
    if not num:
        return examples
    length = min(TEXT_LENGTH, seq_len)
    num_texts = -(-num * seq_len // length)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    num_batches = -(-num_texts // (NUM_TEXTS * ranks))
    known = windows.unique()
    mine = [
        _write(model, known, min(NUM_TEXTS, num_texts), length, seed + index * ranks + rank)
        for index in range(num_batches)
    ]
    texts = accelerator.gather(torch.stack(mine)).unflatten(0, (ranks, num_batches))
    own = texts.transpose(0, 1).flatten()[: num * seq_len].view(num, seq_len)
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:num]
    windows[chosen] = own.cpu()
    return Examples({**examples.tensors, "input_ids": windows})


@torch.no_grad()
def _write(model: PreTrainedModel, tokens: Tensor, num: int, length: int, seed: int) -> Tensor:
    """Texts that begin with a random one of some tokens, `(num, length)` int64 on the device."""
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
        min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=0,
    )  # fmt: skip
    is_training, device = model.training, model.device
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        first = tokens[torch.randint(len(tokens), (num, 1))].to(device)
        mask = torch.ones_like(first)
        generate: Any = model.generate  # torch takes methods of modules for tensors
        texts: Tensor = generate(first, attention_mask=mask, generation_config=config)
    model.train(is_training)
    return texts
