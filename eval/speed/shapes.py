"""Random checkpoints of real sizes, and shapes that are smaller in proportion."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig

from eval.baselines.network import zeros
from llm_vtrans.allocation.allocate import Allocator, PrunePlan
from llm_vtrans.budget.cost import Budget, dense_shape, parameter_cost
from llm_vtrans.budget.problem import Problem, uniform_shape
from llm_vtrans.embedded import EMBEDDED_MODEL
from llm_vtrans.export.shard_writer import ShardWriter
from llm_vtrans.families import Architecture, Axis, Shape, family_for
from llm_vtrans.families.base import UNIT_AXES

RANDOM = "random:"  # in front of a size, in place of a folder
VOCAB_SIZE = 32000
SIZES = {  # hidden, FFN, layers, heads
    "7b": (4096, 11008, 32, 32),
    "1b": (2048, 5504, 22, 16),
    "small": (1024, 2752, 12, 16),
    "160m": (768, 2048, 12, 12),
}
SHARD_SIZE = 500_000_000
FINENESS = 2000  # steps in which a proportion is searched


def llama(
    hidden: int, ffn: int, layers: int, heads: int, vocab_size: int = VOCAB_SIZE
) -> LlamaConfig:
    """A config of these sizes in bfloat16."""
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=vocab_size, max_position_embeddings=4096,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def write_checkpoint(folder: Path, config: LlamaConfig, shard_size: int = SHARD_SIZE) -> None:
    """Random weights, with the embedded model's tokenizer.

    Args:
        folder: to create.
        config: of the model.
        shard_size: bytes of a shard at most.
    """
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED_MODEL / name, folder / name)
    named = family_for("llama").describe(config).named_tensors()
    specs = {name: (spec.shape, torch.bfloat16) for name, (spec, _) in named.items()}
    writer = ShardWriter(folder, specs, shard_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where numbers are drawn faster
    for name, (size, dtype) in specs.items():
        weight = torch.empty(size, dtype=dtype, device=device)
        writer.write(name, weight.normal_(0, 0.02) if len(size) > 1 else weight.fill_(1))
    writer.close()


def problem_of(architecture: Architecture, sparsity: float, round_to: int = 1) -> Problem:
    """A budget over all parameters, in the stock layout."""
    cost = parameter_cost(architecture)
    dense = cost.of(dense_shape(architecture))
    budget = Budget("params", int((1 - sparsity) * dense), dense)
    return Problem(architecture, cost, budget, round_to, True)


def proportional_shape(architecture: Architecture, problem: Problem) -> Shape:
    """The largest shape within the budget that keeps about the same share along every axis."""
    units, layers = architecture.num_units, torch.ones(architecture.num_layers, dtype=torch.bool)
    allowed = {axis: problem.counts(axis, True) for axis in units}
    for step in range(FINENESS, 0, -1):
        counts = {
            axis: max([n for n in allowed[axis] if n <= step / FINENESS * units[axis]] or [0])
            for axis in units
        }
        heads, hidden = counts[Axis.HEADS], counts[Axis.HIDDEN]
        head_dim = architecture.head_dim if problem.is_coupled else None
        if head_dim is not None:
            head_dim = min(head_dim, hidden // max(1, heads))
            hidden = heads * head_dim
        if not min(heads, hidden, counts[Axis.FFN]):
            break
        shape = uniform_shape(hidden, heads, counts[Axis.FFN], layers, head_dim)
        if problem.used(shape) <= 1:
            return shape
    raise ValueError("no proportional shape is within the budget")


def proportional_plan(problem: Problem) -> PrunePlan:
    """Random units to keep, as many as `proportional_shape` says."""
    architecture = problem.architecture
    shape = proportional_shape(architecture, problem)
    counts = (shape.hidden, shape.heads[0], shape.ffn[0])
    draw = torch.Generator().manual_seed(0)
    scores = {
        name: torch.rand(empty.shape, generator=draw, dtype=torch.float64)
        for name, empty in zeros(architecture, *UNIT_AXES).items()
    }
    return Allocator(scores, {}, problem).plan(fixed=dict(zip(UNIT_AXES, counts, strict=True)))
