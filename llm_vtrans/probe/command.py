"""`llm-vtrans probe`: what the dense model's heads look at, kept heads against pruned ones."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from llm_vtrans.calibration.text import EMBEDDED, TextSource
from llm_vtrans.calibration.text import documents as read_documents
from llm_vtrans.commands.command import Parser, positive
from llm_vtrans.embedded.corpus import heldout_documents
from llm_vtrans.errors import UserError
from llm_vtrans.loading.source import Source, load_tokenizer, open_source
from llm_vtrans.probe.attention import CATEGORIES, examples, measure
from llm_vtrans.probe.pictures import probe_page
from llm_vtrans.probe.significance import compare
from llm_vtrans.probe.texts import Windows, cut, num_windows_text
from llm_vtrans.record.masks_file import read_masks
from llm_vtrans.record.output_folder import atomic_write_text
from llm_vtrans.record.reporting import table, versions

EXAMPLE_TOKENS = 24
MAX_CHARACTERS = 5_000_000  # of text that is read: far more than is probed


def probe(arguments: list[str]) -> None:
    """Probes a dense model, writes `probe.json` and `index.html`, prints the figures.

    Args:
        arguments: the command line after the command's name.

    Raises:
        UserError: model, run or text cannot be used, or they do not belong together.
    """
    args = parse(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = open_source(args.model)
    masks = read_masks(args.run, source.checkpoint.sha256)
    kept, signal = head_masks(masks, args.run)
    tokenizer = load_tokenizer(source)
    is_causal = looks_back(source.config)
    seq_len = min(args.seq_len, source.architecture.max_positions)
    windows = cut(tokenizer, read_text(args), seq_len, args.samples, is_causal)
    model = load_eager(source)
    shares, even = measure(model, windows, args.batch_size, is_causal)
    result = collect(args, shares, even, kept, signal, windows)
    chosen = example_heads(kept, signal, shares.shape[1] // kept.shape[1])
    result["examples"] = draw_examples(model, tokenizer, windows, chosen, shares, kept)
    args.output.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.output / "probe.json", json.dumps(result, indent=1) + "\n")
    atomic_write_text(args.output / "index.html", probe_page(result))
    print(summary(result))
    print(args.output)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(prog="llm-vtrans probe", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the dense model: folder, hub id or embedded")
    add("--run", type=Path, required=True, help="result of prune on that model")
    add("--data", default=EMBEDDED, help="evaluation text, as of prune (default: embedded)")
    add("--text-field", help="column that holds the text")
    add("--samples", type=positive, default=64, help="windows, or documents of an encoder")
    add("--seq-len", type=positive, default=256, help="tokens in a window at most")
    add("--batch-size", type=positive, default=8, help="windows in a forward pass")
    add("--output", type=Path, help="folder to write (default: RUN/probe)")
    args = parser.parse_args(arguments)
    args.output = args.output or args.run / "probe"
    if args.seq_len < 4:
        raise UserError(f"--seq-len must be at least 4, got {args.seq_len}")
    return args


def looks_back(config: PretrainedConfig) -> bool:
    """Whether a token sees those before it alone, as in a decoder, whatever its head is."""
    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def read_text(args: argparse.Namespace) -> list[str]:
    """Documents to probe on; of the embedded text the held-out ones."""
    if args.data == EMBEDDED:
        return list(heldout_documents())
    texts, size = [], 0
    for text in read_documents(TextSource(args.data, text_field=args.text_field)):
        texts.append(text)
        size += len(text)
        if size > MAX_CHARACTERS:
            break
    return texts


def load_eager(source: Source) -> Any:
    """The dense model with attention that gives its weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = source.auto_class.from_pretrained(
        source.checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.to(device).eval()


def head_masks(masks: dict[str, Tensor], run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Kept flags and log signal-to-noise ratios of the head units, `(num_layers, num_units)`.

    Raises:
        UserError: heads were not pruned in this run.
    """
    if "mu.heads" not in masks:
        raise UserError(f"--run {run}: pruned no heads; give a run with heads in --prune")
    signal = torch.log(masks["mu.heads"].square() + 1e-8) - masks["log_var.heads"]
    return masks["keep.heads"].bool().numpy(), signal.double().numpy()


def collect(
    args: argparse.Namespace,
    shares: Tensor,
    even: Tensor,
    kept: np.ndarray,
    signal: np.ndarray,
    windows: Windows,
) -> dict[str, Any]:
    """Everything that `probe.json` holds but the examples.

    A unit is a key/value group with all of its query heads: they are pruned together, so
    the tests count them as one observation.
    """
    layers, heads, _ = shares.shape
    if kept.shape[0] != layers or heads % kept.shape[1]:
        raise UserError(
            f"--run {args.run}: {kept.shape} masks of heads, the model has {layers} layers of "
            f"{heads} heads: they do not belong together"
        )
    group = heads // kept.shape[1]
    units = shares.numpy().reshape(layers, kept.shape[1], group, -1).mean(2)
    seen = [i for i in range(len(CATEGORIES)) if units[..., i].any()]  # decoders: no `next`
    names = [CATEGORIES[i] for i in seen]
    tests = dict(zip(names, compare(units[..., seen], kept, signal), strict=True))
    return {
        "model": args.model,
        "run": args.run.name,
        "protocol": f"Attention of the dense model over {num_windows_text(windows)}, text "
        f"{Path(args.data).name}; means over the queries that are no special tokens.",
        "unit_name": "attention heads" if group == 1 else f"groups of {group} query heads",
        "categories": list(CATEGORIES),
        "even": even.tolist(),
        "shares": shares.tolist(),
        "heads_kept": np.repeat(kept, group, axis=1).tolist(),
        "unit_shares": units.tolist(),
        "units_kept": kept.tolist(),
        "signal": signal.tolist(),
        "tests": tests,
        "versions": versions(),
    }


def example_heads(kept: np.ndarray, signal: np.ndarray, group: int) -> list[tuple[int, int]]:
    """Up to two kept heads of the strongest and two pruned of the weakest signal.

    The first query head stands for its group.
    """
    order = np.argsort(-signal, axis=None)
    places = [tuple(map(int, np.unravel_index(i, signal.shape))) for i in order]
    strongest = [p for p in places if kept[p]][:2]
    weakest = [p for p in places[::-1] if not kept[p]][:2]
    return [(layer, unit * group) for layer, unit in (*strongest, *weakest)]


def draw_examples(
    model: Any,
    tokenizer: Any,
    windows: Windows,
    heads: list[tuple[int, int]],
    shares: Tensor,
    kept: np.ndarray,
) -> list[dict[str, Any]]:
    """Attention of a few heads over the first tokens of the first window."""
    stop = min(EXAMPLE_TOKENS, int(windows.is_token[0].sum()))
    device = next(model.parameters()).device
    fields = (windows.input_ids, windows.is_token, windows.is_special, windows.is_keyword)
    first = Windows(*(t[:1, :stop].to(device) for t in fields))
    tokens = [
        {
            "text": tokenizer.decode([int(first.input_ids[0, i])]).strip() or "␣",
            "is_special": bool(first.is_special[0, i]),
            "is_keyword": bool(first.is_keyword[0, i]),
        }
        for i in range(stop)
    ]
    group = shares.shape[1] // kept.shape[1]
    return [
        {
            "layer": layer,
            "head": head,
            "is_kept": bool(kept[layer, head // group]),
            "shares": shares[layer, head].tolist(),
            "tokens": tokens,
            "weights": [[round(w, 4) for w in row] for row in weights.tolist()],
        }
        for (layer, head), weights in zip(heads, examples(model, first, heads), strict=True)
    ]


def summary(result: dict[str, Any]) -> str:
    """The figures as text for the terminal."""
    lines: list[tuple[str, ...]] = [
        ("attention on", "kept", "pruned", "even", "Cohen's d", "p", "p (Holm)", "p in layers",
         "Spearman", "its p")
    ]  # fmt: skip
    for index, category in enumerate(result["categories"]):
        test = result["tests"].get(category)
        if test is None:
            continue

        def show(name: str, form: str = ".4f", test: dict[str, Any] = test) -> str:
            return "-" if test[name] is None else f"{test[name]:{form}}"

        lines.append(
            (category, show("kept"), show("pruned"), f"{result['even'][index]:.4f}",
             show("cohens_d", "+.2f"), show("p_value"), show("p_holm"), show("p_within_layers"),
             show("spearman", "+.2f"), show("p_spearman"))
        )  # fmt: skip
    flags = np.array(result["units_kept"])
    count = f"{int(flags.sum())} kept and {int((~flags).sum())} pruned ({result['unit_name']})"
    return f"{result['protocol']}\n{count}\n{table(lines)}"
