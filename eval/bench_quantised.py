"""What a quantised base costs in perplexity and saves in memory, before any pruning.

    python eval/bench_quantised.py --model DIR --text FILE [--limit 40 --seq-len 256]

The masks' teacher is the base as it is held, so this is the cost that training starts from. The
export is cut from the full-precision shards and does not carry it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from llm_vtrans.arguments import LOAD_FORMS
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import load_tokenizer, open_source
from llm_vtrans.record.reporting import table
from llm_vtrans.scoring.perplexity import text_windows, token_perplexity


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and of what their quantisation keeps beside them."""
    total = 0
    for parameter in model.parameters():
        total += parameter.untyped_storage().nbytes()
        state = getattr(parameter, "quant_state", None)
        total += 0 if state is None else state.absmax.untyped_storage().nbytes()
        scales = getattr(parameter, "SCB", None)
        total += 0 if scales is None else scales.untyped_storage().nbytes()
    return total


def main() -> None:
    """Prints one row per form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="dense checkpoint")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text to score")
    parser.add_argument("--limit", type=int, default=40, help="windows")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a window")
    args = parser.parse_args()
    source = open_source(args.model)
    documents = args.text.read_text(encoding="utf-8").split("\n\n")
    windows = text_windows(load_tokenizer(source), documents, args.seq_len, args.limit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[tuple[str, ...]] = [("--load-in", "MB", "perplexity", "nats per token more")]
    dense = 0.0
    for form in LOAD_FORMS:
        model = load_model(source, torch.float32, device, form=form)
        value = token_perplexity(model, windows).value
        dense = dense or value
        size = f"{held_bytes(model) / 1e6:.2f}"
        rows.append((form, size, f"{value:.2f}", f"{math.log(value / dense):+.4f}"))
    print(
        f"{args.model}: token-level perplexity over {len(windows)} windows of {args.seq_len} "
        f"tokens of {args.text.name}, computed in float32 on {device.type}"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
