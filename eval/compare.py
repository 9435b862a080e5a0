"""Baselines at the same budget: random units and units by weight magnitude.

    python eval/compare.py --model DIR --data TEXT --text TEXT --sparsity 0.2 0.5 [--run RUN ...]

Selections are made on the same groups, under the same budget over all parameters and the
same layouts as the main job, and scored by the same token-level perplexity. A `--run` is a
result of `prune.py`, loaded by stock `transformers`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_vtrans.allocation import Problem, allocate_scores
from llm_vtrans.attachment import MaskedModel
from llm_vtrans.budget import Budget, dense_shape, parameter_cost
from llm_vtrans.families import Architecture, Axis
from llm_vtrans.loading import Source, load_model, load_tokenizer, open_source
from llm_vtrans.output_folder import MANIFEST_FILE
from llm_vtrans.reporting import table
from llm_vtrans.scoring import text_windows, token_perplexity

UNITS = (Axis.HIDDEN, Axis.HEADS, Axis.FFN)


def ranks(values: Tensor) -> Tensor:
    """Ranks over a structure in (0, 1): one threshold then keeps one share of every structure."""
    flat = values.flatten().argsort(stable=True).argsort(stable=True).double()
    return ((flat + 0.5) / flat.numel()).view_as(values)


def random_scores(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """Every unit has an independent uniform score."""
    generator = torch.Generator().manual_seed(seed)
    shapes = unit_shapes(architecture)
    return {n: ranks(torch.rand(shape, generator=generator)) for n, shape in shapes.items()}


def unit_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of the units of each structure."""
    units, layers = architecture.num_units, architecture.num_layers
    return {a.value: ((layers,) if a is not Axis.HIDDEN else ()) + (units[a],) for a in UNITS}


def magnitude_scores(source: Source) -> dict[str, Tensor]:
    """Root mean square of all weights of a unit."""
    architecture = source.architecture
    shapes = unit_shapes(architecture)
    squares = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    counts = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name, (spec, layer) in architecture.named_tensors().items():
        weight = source.checkpoint.read(name).double()
        for index, dim in enumerate(spec.dims):
            if dim.axis is None:
                continue
            rows = weight.movedim(index, 0).reshape(architecture.num_units[dim.axis], -1)
            at = ... if dim.axis is Axis.HIDDEN else layer
            squares[dim.axis][at] += rows.square().sum(1)
            counts[dim.axis][at] += rows.shape[1]
    return {name: ranks((squares[name] / counts[name]).sqrt()) for name in shapes}


def main() -> None:
    """Prints one table: method, layout, sparsity, perplexity on every text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="dense checkpoint")
    parser.add_argument("--text", nargs="+", required=True, help="text files to score on")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--run", nargs="*", default=[], help="results of prune.py")
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--limit", type=int, help="windows per text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file for the rows")
    args = parser.parse_args()

    source = open_source(args.model)
    tokenizer = load_tokenizer(source)
    windows = {
        Path(text).stem: text_windows(
            tokenizer, [Path(text).read_text()], args.context_length, args.limit
        )
        for text in args.text
    }
    architecture = source.architecture
    cost = parameter_cost(architecture)
    dense = cost.of(dense_shape(architecture))
    masked = MaskedModel(load_model(source, torch.float32, torch.device("cpu")), architecture)

    def score(model: torch.nn.Module) -> list[str]:
        return [f"{token_perplexity(model, w).value:.2f}" for w in windows.values()]

    rows = [("method", "layout", "parameters", *windows)]
    rows.append(("dense", "", f"{dense:,}", *score(masked.model)))
    scores = {
        "random": random_scores(architecture, args.seed),
        "magnitude": magnitude_scores(source),
    }
    for sparsity in args.sparsity:
        budget = Budget("params", int((1 - sparsity) * dense), dense)
        for layout in ("stock", "per-layer"):
            problem = Problem(architecture, cost, budget, 1, layout == "stock")
            for name, values in scores.items():
                plan = allocate_scores(values, {}, problem)
                masked.set_gates(plan.hard())
                rows.append((name, layout, f"{cost.of(plan.shape):,}", *score(masked.model)))
                masked.set_gates(None)
    for run in args.run:
        manifest = json.loads((Path(run) / MANIFEST_FILE).read_text())
        model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
        after = f"{manifest['params']['after']:,}"
        rows.append((f"VIB ({Path(run).name})", manifest["layout"], after, *score(model)))
    print(
        f"token-level perplexity over non-overlapping windows of {args.context_length} tokens: "
        + ", ".join(f"{name} {w.numel():,} tokens" for name, w in windows.items())
    )
    print(table(rows))
    if args.output:
        Path(args.output).write_text(
            json.dumps([dict(zip(rows[0], row, strict=True)) for row in rows[1:]], indent=2)
        )


if __name__ == "__main__":
    main()
