"""Probing text: token windows in which special tokens and task keywords are marked.

Keywords stand for what matters in the text: content words of high inverse document
frequency. A word is a run of letters; the quarter of the words in the text (by occurrences) that is
rarest over its documents are keywords, words of fewer than four letters never.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_vtrans.errors import UserError

WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
KEYWORD_SHARE = 0.25
MIN_LETTERS = 4


@dataclass(frozen=True)
class Windows:
    """Tokens with what probing needs to know of each.

    Attributes:
        input_ids: `(num_windows, seq_len)` int64.
        is_token: False at padding, same shape.
        is_special: special tokens, and for a decoder the first position (the sink).
        is_keyword: tokens of a keyword.
    """

    input_ids: Tensor
    is_token: Tensor
    is_special: Tensor
    is_keyword: Tensor


def keywords(documents: Sequence[str]) -> frozenset[str]:
    """Lower-case words that count as keywords of these documents."""
    words = [[w.lower() for w in WORD.findall(document)] for document in documents]
    frequency = Counter(word for document in words for word in set(document))
    occurrences = Counter(word for document in words for word in document)
    wanted = KEYWORD_SHARE * sum(occurrences.values())
    chosen: set[str] = set()
    covered = 0
    # The rarest first; words of one document frequency come or stay away together.
    for level in sorted(set(frequency.values())):
        group = {w for w, n in frequency.items() if n == level and len(w) >= MIN_LETTERS}
        covered += sum(occurrences[word] for word in group)
        if chosen and covered > wanted:
            break
        chosen |= group
    return frozenset(chosen)


def cut(
    tokenizer: Any, documents: Sequence[str], seq_len: int, limit: int, is_causal: bool
) -> Windows:
    """Tokenises text for probing.

    Args:
        tokenizer: of the dense model; it must give character offsets.
        documents: of the evaluation text.
        seq_len: tokens in a window.
        limit: windows at most.
        is_causal: a decoder reads documents packed without special tokens; an encoder reads
            each document by itself, with its special tokens, cut and padded to `seq_len`.

    Raises:
        UserError: a tokenizer without offsets, or too little text.
    """
    if not tokenizer.is_fast:
        raise UserError("probing needs a fast tokenizer (tokenizer.json): convert it first")
    chosen = keywords(documents)
    texts = ["\n\n".join(documents)] if is_causal else [d for d in documents if d.strip()][:limit]
    encoded = tokenizer(
        texts,
        add_special_tokens=not is_causal,
        max_length=None if is_causal else seq_len,
        truncation=not is_causal,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    rows: list[Any] = []
    for text, ids, offsets, special in zip(
        texts, encoded["input_ids"], encoded["offset_mapping"],
        encoded["special_tokens_mask"], strict=True,
    ):  # fmt: skip
        flags = _keyword_flags(text, offsets, chosen)
        rows += (
            list(zip(ids, special, flags, strict=True))
            if is_causal
            else [list(zip(ids, special, flags, strict=True))]
        )
    if is_causal:
        count = min(limit, len(rows) // seq_len)
        rows = [rows[i * seq_len : (i + 1) * seq_len] for i in range(count)]
    if not rows:
        raise UserError(f"--data: less text than one window of {seq_len} tokens: give more")
    return _stack(rows, tokenizer, is_causal)


def _stack(rows: list[Any], tokenizer: Any, is_causal: bool) -> Windows:
    length = max(map(len, rows))
    pad = (tokenizer.pad_token_id or 0, 1, False)
    padded = [[*row, *[pad] * (length - len(row))] for row in rows]
    ids, special, flags = (
        torch.tensor([[int(token[i]) for token in row] for row in padded]) for i in range(3)
    )
    is_token = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
    is_special = special.bool() & is_token
    if is_causal:
        is_special[:, 0] = True
    return Windows(ids, is_token, is_special, flags.bool() & ~is_special)


def _keyword_flags(
    text: str, offsets: Sequence[tuple[int, int]], chosen: frozenset[str]
) -> list[bool]:
    """Whether each token lies in a keyword; leading spaces of a token do not count."""
    spans = [m.span() for m in WORD.finditer(text) if m.group().lower() in chosen]
    starts = [start for start, _ in spans]
    flags = []
    for begin, end in offsets:
        while begin < end and text[begin].isspace():
            begin += 1
        index = bisect_right(starts, begin) - 1
        flags.append(begin < end and index >= 0 and begin < spans[index][1])
    return flags


def num_windows_text(windows: Windows) -> str:
    """`64 windows of 256 tokens, 12.3% of them keywords`, for people."""
    count, length = windows.input_ids.shape
    share = 100 * float(windows.is_keyword.sum() / windows.is_token.sum())
    assert math.isfinite(share)
    return f"{count} windows of up to {length} tokens, {share:.1f}% of them in keywords"
