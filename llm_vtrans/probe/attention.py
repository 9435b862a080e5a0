"""Attention shares of every head, measured with one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.errors import UserError
from llm_vtrans.masking.hooks import removed_after
from llm_vtrans.probe.texts import Windows

CATEGORIES = ("special", "current", "previous", "next", "keywords")


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The innermost attention module of every layer, in order of definition.

    In `transformers` these return `(output, weights)` under eager attention, the weights
    `(batch, heads, queries, keys)`; their class names end in `Attention`.
    """
    found = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    return [
        m for m in found
        if not any(type(c).__name__.endswith("Attention") for c in m.modules() if c is not m)
    ]  # fmt: skip


@contextmanager
def watching(model: nn.Module, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Shows each layer's attention weights to `see(layer, weights)` as soon as they exist.

    The layer drops them when it returns, so no two layers' weights are alive together.

    Raises:
        UserError: the model has no attention module that returns its weights.
    """
    modules = attention_modules(model)
    if not modules:
        raise UserError("no attention modules were found: probing does not know this model")

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if weights is None:
                raise UserError(
                    "this model gives no attention weights even under eager attention: "
                    "probing does not know it"
                )
            see(layer, weights)

        return hook

    handles = [m.register_forward_hook(hook_of(i)) for i, m in enumerate(modules)]
    with removed_after(handles):
        yield


@torch.no_grad()
def measure(
    model: nn.Module, windows: Windows, batch_size: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Mean attention share of every head and category.

    A query's share of a category is the sum of its attention weights on the keys of the
    category; special tokens and padding do not count as queries. Categories overlap, but
    a keyword at the current position counts as current alone.

    Args:
        model: with eager attention, in evaluation mode.
        windows: marked tokens.
        batch_size: windows in a forward pass.
        is_causal: whether a query sees earlier keys only.

    Returns:
        Shares `(num_layers, num_heads, 5)` float64, and `(5,)` of attention that spreads
        evenly over what each query sees.
    """
    sums: dict[int, Tensor] = {}
    even = torch.zeros(len(CATEGORIES), dtype=torch.float64)
    device = next(model.parameters()).device
    num_queries = 0
    for start in range(0, len(windows.input_ids), batch_size):
        batch = Windows(
            *(t[start : start + batch_size].to(device)
              for t in (windows.input_ids, windows.is_token, windows.is_special,
                        windows.is_keyword))
        )  # fmt: skip
        is_query = batch.is_token & ~batch.is_special
        num_queries += int(is_query.sum())

        def see(layer: int, weights: Tensor, batch: Windows = batch) -> None:
            shares = shares_of(weights, batch)
            sums[layer] = sums[layer] + shares if layer in sums else shares

        with watching(model, see):
            forward(model, batch)
        even += shares_of(_even(batch, is_causal), batch)[0]
    layers = torch.stack([sums[i] for i in range(len(sums))])
    return layers / num_queries, even / num_queries


def forward(model: nn.Module, batch: Windows) -> None:
    """One pass through the network's body: logits are of no use here."""
    body = getattr(model, "base_model", model)
    mask = None if bool(batch.is_token.all()) else batch.is_token.long()
    cache = {"use_cache": False} if getattr(model.config, "is_decoder", False) else {}
    body(input_ids=batch.input_ids, attention_mask=mask, **cache)


def shares_of(weights: Tensor, batch: Windows) -> Tensor:
    """Shares summed over the queries of a batch.

    Args:
        weights: `(batch, heads, queries, keys)`.
        batch: the tokens.

    Returns:
        `(heads, 5)` float64 on the CPU, in the order of `CATEGORIES`.
    """
    weights = weights.float()
    special, keyword = batch.is_special.float(), batch.is_keyword.float()
    current = weights.diagonal(dim1=-2, dim2=-1)
    previous = torch.zeros_like(current)
    previous[..., 1:] = weights.diagonal(-1, -2, -1)
    following = torch.zeros_like(current)
    following[..., :-1] = weights.diagonal(1, -2, -1)
    on_special = torch.einsum("bhqk,bk->bhq", weights, special)
    on_keywords = torch.einsum("bhqk,bk->bhq", weights, keyword) - current * keyword[:, None]
    by_query = torch.stack([on_special, current, previous, following, on_keywords], dim=-1)
    is_query = (batch.is_token & ~batch.is_special).to(by_query.dtype)
    return torch.einsum("bhqc,bq->hc", by_query, is_query).double().cpu()


def _even(batch: Windows, is_causal: bool) -> Tensor:
    """Attention `(batch, 1, queries, keys)` spread evenly over the keys that are seen."""
    length = batch.input_ids.shape[1]
    sees = batch.is_token[:, None, None, :].expand(-1, 1, length, -1).float()
    if is_causal:
        sees = sees.tril()
    return sees / sees.sum(-1, keepdim=True).clamp(min=1)


@torch.no_grad()
def examples(model: nn.Module, window: Windows, heads: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Attention `(queries, keys)` of a few heads over one window.

    Args:
        model: with eager attention.
        window: a single window.
        heads: layer and head of each.
    """
    found: dict[tuple[int, int], Tensor] = {}

    def see(layer: int, weights: Tensor) -> None:
        for chosen in heads:
            if chosen[0] == layer:
                found[chosen] = weights[0, chosen[1]].float().cpu()

    with watching(model, see):
        forward(model, window)
    return [found[chosen] for chosen in heads]
