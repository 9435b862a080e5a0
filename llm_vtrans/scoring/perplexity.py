"""SCORE: token-level perplexity, and scores that carry their standard errors.

The protocol of every perplexity here is token-level: the text is tokenised once
without special tokens and cut into non-overlapping windows of `context_length`
tokens; each window predicts its last `context_length - 1` tokens, and all
predicted tokens weigh the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm_vtrans.errors import UserError

NUM_JACKKNIFE_GROUPS = 100
NAMED_TEXTS = {  # what `ppl:NAME` reads, below the data folder; "embedded" needs no file
    "wikitext2": "text/wikitext2/test.txt",
    "general": "text/general/heldout.txt",
    "embedded": None,
}


@dataclass(frozen=True)
class Perplexity:
    """Token-level perplexity over non-overlapping windows.

    Attributes:
        value: `exp(nll)`.
        nll: mean negative log-likelihood of a predicted token, in nats.
        num_tokens: how many tokens were predicted.
        context_length: tokens in a window, the unpredicted first one included.
    """

    value: float
    nll: float
    num_tokens: int
    context_length: int


@dataclass(frozen=True)
class Estimate:
    """A score and the share of its standard error that each scored unit brings.

    Attributes:
        value: the score.
        deviations: `(num_units,)` float64, one per document or window, scaled so that
            the standard error is the root of the sum of their squares. Two models
            scored on the same units have correlated deviations, so the error of a
            difference comes from the differences of the deviations.
    """

    value: float
    deviations: np.ndarray

    @property
    def stderr(self) -> float:
        """Standard error of `value`; NaN where a single unit was scored."""
        return float(np.sqrt(np.square(self.deviations).sum()))

    def minus(self, other: Estimate) -> Estimate:
        """This score minus another on the same units: a paired difference."""
        difference = self.value - other.value
        if self.deviations.shape == other.deviations.shape:
            return Estimate(difference, self.deviations - other.deviations)
        return Estimate(difference, np.concatenate([self.deviations, other.deviations]))


def ratio_estimate(
    totals: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray,
    exponential: bool = False,
) -> Estimate:
    """Estimate `sum(totals) / sum(weights)` or its exponential, by the delta method.

    Args:
        totals: `(num_units,)`, for example the negative log-likelihood of each window.
        weights: `(num_units,)`, for example the predicted tokens of each window.
        exponential: take `exp` of the ratio, which makes a perplexity of nats per token.

    Returns:
        The estimate; with all weights one, its standard error is `std / sqrt(num_units)`.
    """
    totals = np.asarray(totals, dtype=np.float64)
    weights = np.asarray(weights, dtype=np.float64)
    ratio = totals.sum() / weights.sum()
    with np.errstate(over="ignore"):
        value = slope = float(np.exp(ratio)) if exponential else 1.0
    num_units = len(totals)
    if num_units < 2:
        deviations = np.full(1, np.nan)
    else:
        scale = slope / (weights.mean() * math.sqrt(num_units * (num_units - 1)))
        deviations = scale * (totals - ratio * weights)
    return Estimate(value if exponential else float(ratio), deviations)


def jackknife_estimate(aggregate: Callable[[list[Any]], float], items: list[Any]) -> Estimate:
    """Estimate any aggregate of per-document items by the delete-a-group jackknife."""
    value = float(aggregate(items))
    num_groups = min(len(items), NUM_JACKKNIFE_GROUPS)
    if num_groups < 2:
        return Estimate(value, np.full(1, np.nan))
    replicates = np.array(
        [
            aggregate([item for i, item in enumerate(items) if i % num_groups != group])
            for group in range(num_groups)
        ],
        dtype=np.float64,
    )
    scale = math.sqrt((num_groups - 1) / num_groups)
    return Estimate(value, scale * (replicates - replicates.mean()))


def text_documents(name: str, data_dir: Path) -> list[str]:
    """Read the text of a task `ppl:NAME`.

    Args:
        name: a key of `NAMED_TEXTS` or the path of any `.txt` file in UTF-8.
        data_dir: folder of the named texts.

    Returns:
        Its documents, which blank lines separate in a file; a file without any is one.

    Raises:
        UserError: there is no such text.
    """
    if name == "embedded":
        from llm_vtrans.embedded.corpus import heldout_documents

        return heldout_documents()
    if name not in NAMED_TEXTS and not name.endswith(".txt"):
        raise UserError(
            f"unknown task 'ppl:{name}': choose ppl:{', ppl:'.join(NAMED_TEXTS)} or ppl:FILE.txt"
        )
    named = NAMED_TEXTS.get(name)
    path = data_dir / named if named else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "set --data-dir to its folder" if named else "it must be a UTF-8 text file"
        raise UserError(f"task ppl:{name} cannot read {path}: {remedy}") from error
    return text.split("\n\n")


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    context_length: int,
    limit: int | None = None,
) -> Tensor:
    r"""Cut text into non-overlapping windows, dropping the ragged end.

    Args:
        tokenizer: adds no special tokens here, neither at the start nor between documents.
        documents: joined by a blank line (`"\n\n"`) and tokenised once.
        context_length: tokens in a window, at least 2.
        limit: keep the first `limit` windows only; `None` keeps all.

    Returns:
        Token ids, `(num_windows, context_length)`, int64.

    Raises:
        UserError: the text does not fill one window.
    """
    text = "\n\n".join(documents)
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    num_windows = len(token_ids) // context_length
    if num_windows == 0:
        raise UserError(
            f"the text has {len(token_ids)} tokens, less than one window of {context_length}: "
            "give more text or a shorter context length"
        )
    num_windows = num_windows if limit is None else min(num_windows, limit)
    kept = torch.tensor(token_ids[: num_windows * context_length], dtype=torch.int64)
    return kept.view(num_windows, context_length)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and give every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def window_nlls(model: nn.Module, windows: Tensor, batch_size: int = 8) -> Tensor:
    """Sum the negative log-likelihood of each window's predicted tokens.

    Args:
        model: a causal language model whose output has `logits`; stays on its device.
        windows: token ids, `(num_windows, context_length)`, int64.
        batch_size: windows in a forward pass.

    Returns:
        Nats, `(num_windows,)`, float64 on the CPU. The loss of a token is computed in
        float32 whatever the model's dtype, the sums in float64.
    """
    device = next(model.parameters()).device
    sums: list[Tensor] = []
    with _evaluation_mode(model), torch.autocast(device.type, enabled=False):
        for batch in windows.split(batch_size):
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            # One window at a time: float32 logits of a whole batch would be the peak of memory.
            losses = [
                F.cross_entropy(row[:-1].float(), target[1:], reduction="none")
                for row, target in zip(logits, batch, strict=True)
            ]
            sums.append(torch.stack(losses).cpu().double().sum(dim=1))
    return torch.cat(sums)


def token_perplexity(model: nn.Module, windows: Tensor, batch_size: int = 8) -> Perplexity:
    """Measure token-level perplexity over non-overlapping windows.

    Args:
        model: a causal language model; the pass runs on its device, without dropout,
            gradients or autocast.
        windows: token ids, `(num_windows, context_length)`, int64, as `text_windows` cuts them.
        batch_size: windows in a forward pass; the last batch may be smaller.

    Returns:
        The perplexity, every window weighted by its `context_length - 1` predicted tokens.

    Raises:
        UserError: there is no window, or a window predicts nothing.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UserError(
            f"windows must be (num_windows >= 1, context_length >= 2), got {tuple(windows.shape)}"
        )
    num_windows, context_length = windows.shape
    num_tokens = num_windows * (context_length - 1)
    nll = window_nlls(model, windows, batch_size).sum().item() / num_tokens
    return Perplexity(float(np.exp(nll)), nll, num_tokens, context_length)
