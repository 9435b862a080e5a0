"""Pretrain a small network from scratch; without `--data` it reproduces the embedded model."""

import argparse
import json
import math
import platform
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llm_vtrans.embedded.corpus import heldout_documents, training_documents
from llm_vtrans.embedded.networks import (
    GROUPED_QUERIES,
    KINDS,
    Loss,
    build_model,
    next_token_loss,
)
from llm_vtrans.errors import UserError

WARMUP_FRACTION = 0.05
HELDOUT_FRACTION = 0.02  # of the documents of --data
PROGRESS_STEPS = 50


def read_documents(paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Return the training and the held-out documents.

    Args:
        paths: UTF-8 text files, documents separated by blank lines. None of them
            stands for the embedded corpus.
    """
    if not paths:
        return training_documents(), heldout_documents()
    try:
        text = "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --data: {error}; give UTF-8 text files") from error
    documents = [document for document in re.split(r"\n(?:[ \t]*\n)+", text) if document.strip()]
    heldout = math.ceil(HELDOUT_FRACTION * len(documents))
    if len(documents) <= heldout:
        raise UserError(f"--data has {len(documents)} documents; separate them by blank lines")
    return documents[:-heldout], documents[-heldout:]


def train_tokenizer(
    documents: Sequence[str], vocab_size: int, max_positions: int, special: Mapping[str, str]
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text.

    Args:
        documents: The training text.
        vocab_size: Number of tokens, including the 256 bytes and the special ones.
        max_positions: Length in tokens of the longest input the model will take.
        special: Special tokens by the names that `transformers` gives their roles.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Tensor:
    """Return all documents as one row of token ids, shape (tokens,), a separator before each."""
    text = "".join(str(tokenizer.eos_token) + document for document in documents)
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def train(
    model: PreTrainedModel, loss_of: Loss, tokens: Tensor, settings: argparse.Namespace, steps: int
) -> None:
    """Train on windows that start anywhere in `tokens`, so that no epoch repeats another's.

    Args:
        model: The model, changed in place.
        loss_of: What it is trained to minimise.
        tokens: Training token ids, shape (tokens,).
        settings: The parsed flags.
        steps: Number of batches.
    """
    optimizer = build_optimizer(model, settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    offsets = torch.arange(settings.seq_len + 1)
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - settings.seq_len, (settings.batch_size, 1))
        loss = loss_of(model, tokens[starts + offsets], step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % PROGRESS_STEPS == 0 or step == steps:
            seconds = (time.monotonic() - started) / step
            speed = settings.batch_size * settings.seq_len / seconds
            eta = (steps - step) * seconds / 60
            progress = f"step {step}/{steps}  loss {loss.item():.3f}"
            print(f"{progress}  {speed:,.0f} tokens/s  ETA {eta:.1f} min", flush=True)


def build_optimizer(model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW that decays the matrices but not the norms' gains."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def rate(step: int, steps: int) -> float:
    """Return the learning rate relative to its peak: linear warmup, then cosine to 10%."""
    warmup = max(1, round(WARMUP_FRACTION * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


@torch.inference_mode()
def model_perplexity(
    model: PreTrainedModel, tokens: Tensor, seq_len: int, loss_of: Loss = next_token_loss
) -> float:
    """Return the token-level perplexity over non-overlapping windows.

    Args:
        model: A language model.
        tokens: Token ids, shape (tokens,). The first token of a window is context
            only; every other one counts the same, also in a short last window.
        seq_len: Window length in tokens.
        loss_of: Mean loss of windows; that of masked tokens gives the pseudo-perplexity.
    """
    model.eval()
    windows = [window for window in torch.split(tokens, seq_len) if len(window) > 1]
    sizes = torch.tensor([len(window) - 1 for window in windows])
    losses = torch.stack([loss_of(model, window[None], 0) for window in windows])
    return math.exp((losses.double() * sizes).sum() / sizes.sum())


def unigram_perplexity(training: Tensor, tokens: Tensor, seq_len: int, vocab_size: int) -> float:
    """Return the perplexity, on the tokens that `model_perplexity` scores, of a unigram model.

    Args:
        training: Token ids whose frequencies, with add-one smoothing, are the model;
            shape (training tokens,).
        tokens: Token ids to score, shape (tokens,).
        seq_len: Window length in tokens.
        vocab_size: Number of tokens in the vocabulary.
    """
    counts = torch.bincount(training, minlength=vocab_size).double() + 1
    targets = torch.cat([window[1:] for window in torch.split(tokens, seq_len)])
    return math.exp(-(counts / counts.sum()).log()[targets].mean())


def pretrain(settings: argparse.Namespace) -> None:
    """Train the tokenizer and the model, evaluate them, and write the checkpoint."""
    check_settings(settings)
    torch.manual_seed(settings.seed)
    kind = KINDS[settings.family]
    training, heldout = read_documents(settings.data)
    tokenizer = train_tokenizer(training, settings.vocab_size, settings.max_positions, kind.special)
    tokens, heldout_tokens = encode(tokenizer, training), encode(tokenizer, heldout)
    if len(tokens) <= settings.seq_len:
        raise UserError(f"the text has {len(tokens)} tokens, fewer than --seq-len; give more text")
    loss_of = partial(kind.loss, tokenizer=tokenizer)
    model = build_model(settings, tokenizer)
    parameters = model.num_parameters()
    batch_tokens = settings.batch_size * settings.seq_len
    steps = math.ceil(settings.tokens_per_parameter * parameters / batch_tokens)
    print(f"{parameters:,} parameters, {len(tokens):,} tokens of text, {steps} steps", flush=True)
    train(model, loss_of, tokens, settings, steps)
    model.bfloat16()  # what is saved is what is evaluated
    record = {
        "parameters": parameters,
        "training_text_tokens": len(tokens),
        "training_tokens": steps * batch_tokens,
        "steps": steps,
        **evaluate(model, loss_of, tokens, heldout_tokens, settings.seq_len),
        "python": platform.python_version(),
        "settings": recordable(settings),
    }
    save(model, tokenizer, record, settings.output)


def evaluate(
    model: PreTrainedModel, loss_of: Loss, training: Tensor, heldout: Tensor, seq_len: int
) -> dict[str, float]:
    """Print and return the held-out perplexities of the model and of a unigram model."""
    perplexity = model_perplexity(model, heldout, seq_len, loss_of)
    unigram = unigram_perplexity(training, heldout, seq_len, model.config.vocab_size)
    ratio = unigram / perplexity
    print(f"held-out perplexity {perplexity:.2f}, unigram {unigram:.2f}: {ratio:.1f} times lower")
    return {
        "heldout_tokens": len(heldout),
        "heldout_perplexity": round(perplexity, 3),
        "unigram_perplexity": round(unigram, 3),
    }


def recordable(settings: argparse.Namespace) -> dict[str, object]:
    """Return the settings that define the model, without the paths of this run."""
    kept = {name: value for name, value in vars(settings).items() if name != "output"}
    return {**kept, "data": [path.name for path in settings.data] or "embedded corpus"}


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, object],
    output: Path,
) -> None:
    """Write the checkpoint under another name first, so that `output` is never half written."""
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    text = json.dumps(record, indent=2) + "\n"
    (unfinished / "pretraining.json").write_text(text, encoding="utf-8")
    unfinished.rename(output)


def check_settings(settings: argparse.Namespace) -> None:
    """Raise `UserError` for flags that no run could honour, before any work is done."""
    if settings.output.exists():
        raise UserError(f"--output {settings.output} exists; name a new folder")
    for name, value in vars(settings).items():
        if name != "seed" and isinstance(value, int | float) and value <= 0 and value is not False:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give a positive number")
    head_size, rest = divmod(settings.hidden_size, settings.num_heads)
    if rest or head_size % 2:
        raise UserError("--hidden-size must be an even multiple of --num-heads")
    if settings.family in GROUPED_QUERIES and settings.num_heads % settings.num_kv_heads:
        raise UserError("--num-heads must be a multiple of --num-kv-heads")
    if not 1 < settings.seq_len <= settings.max_positions:
        raise UserError("--seq-len must be at least 2 and at most --max-positions")
    least = 256 + len(set(KINDS[settings.family].special.values()))
    if settings.vocab_size < least:
        raise UserError(f"--vocab-size must be at least {least}: bytes and special tokens")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; its defaults are the settings of the embedded model."""
    parser = argparse.ArgumentParser(prog="pretrain", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to create")
    add("--data", type=Path, nargs="+", default=[], help="text files (default: embedded corpus)")
    add("--family", choices=tuple(KINDS), default="llama", help="of the network")
    add("--hidden-size", type=int, default=128, help="width of the residual stream")
    add("--num-layers", type=int, default=6, help="each attention and an FFN")
    add("--num-heads", type=int, default=8, help="query heads, or all")
    add("--num-kv-heads", type=int, default=4, help="key and value heads of grouped queries")
    add("--intermediate-size", type=int, default=352, help="FFN units of a layer")
    add("--vocab-size", type=int, default=2048, help="of the tokenizer, trained too")
    add("--tie-embeddings", action="store_true", help="share the embedding with the output layer")
    add("--max-positions", type=int, default=256, help="longest input in tokens")
    add("--seq-len", type=int, default=256, help="training window in tokens")
    add("--batch-size", type=int, default=8, help="windows per step")
    add("--tokens-per-parameter", type=float, default=3.5, help="length of the training")
    add("--learning-rate", type=float, default=3e-3, help="peak")
    add("--seed", type=int, default=0, help="of initial weights and data order")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        pretrain(build_parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
