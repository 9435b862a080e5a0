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

from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.tasks.encoding import Examples

TEXT_LENGTH = 64  # a cache that is short costs little to carry along
NUM_TEXTS = 128  # written at once, the least number
CACHE_SHARE = 0.5  # of a device's memory beside the model: more texts at once take little longer
MOST_TEXTS = 1024


def own_windows(
    model: PreTrainedModel, num: int, like: Examples, accelerator: Accelerator, seed: int
) -> Tensor:
    """Texts of a causal LM's own, packed into windows.

    The ranks share the work, and all get the same texts, however many ranks there are.

    Args:
        model: on the accelerator's device.
        num: of windows.
        like: calibration windows; a text begins with any token of theirs.
        accelerator: the ranks.
        seed: of all draws.

    Returns:
        `(num, seq_len)` int64 on the CPU.
    """
    length = min(TEXT_LENGTH, like.seq_len)
    num_texts = -(-num * like.seq_len // length)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    at_once = agreed(texts_at_once(model, length))
    num_batches = -(-num_texts // (at_once * ranks))
    known = like.tensors["input_ids"].unique()
    mine = [
        _write(model, known, min(at_once, num_texts), length, seed + index * ranks + rank)
        for index in range(num_batches)
    ]
    texts = accelerator.gather(torch.stack(mine)).unflatten(0, (ranks, num_batches))
    return texts.transpose(0, 1).flatten()[: num * like.seq_len].view(num, like.seq_len).cpu()


def texts_at_once(model: PreTrainedModel, length: int) -> int:
    """Texts of `length` tokens that are written together: what the model's device can cache."""
    if model.device.type != "cuda":
        return NUM_TEXTS
    config = model.config.get_text_config()
    cached = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize * length
    memory = torch.cuda.get_device_properties(model.device).total_memory
    free = memory - model.get_memory_footprint(return_buffers=False)
    num = int(CACHE_SHARE * free) // cached // NUM_TEXTS * NUM_TEXTS
    return max(NUM_TEXTS, min(MOST_TEXTS, num))


def with_windows(examples: Examples, windows: Tensor, first: int, seed: int) -> Examples:
    """Examples in which some give way to other windows.

    Args:
        examples: packed windows of calibration text.
        windows: `(num, seq_len)` of the same length.
        first: those before it stay as they are.
        seed: of their places.
    """
    mixed = examples.tensors["input_ids"].clone()
    draw = torch.Generator().manual_seed(seed)
    mixed[first + torch.randperm(len(mixed) - first, generator=draw)[: len(windows)]] = windows
    return Examples({**examples.tensors, "input_ids": mixed})


def cache_of(model: PreTrainedModel) -> str | None:
    """Kind of cache: on a GPU one of fixed size, where the model can use it.

    One that grows asks the device for new memory at every token, which waits for it.
    """
    is_static = model.device.type == "cuda" and model._can_compile_fullgraph
    return "static" if is_static else None


@torch.no_grad()
def _write(model: PreTrainedModel, tokens: Tensor, num: int, length: int, seed: int) -> Tensor:
    """Texts that begin with a random one of some tokens, `(num, length)` int64 on the device."""
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
        min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=0,
        cache_implementation=cache_of(model), disable_compile=True,
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
