"""Budgets of multiply-accumulates, alone and with parameters, on exported models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, GPT2Config, LlamaConfig

from llm_vtrans.allocation.allocate import allocate
from llm_vtrans.arguments import PruneArguments
from llm_vtrans.basis.head_basis import balanced_basis
from llm_vtrans.budget.problem import Problem
from llm_vtrans.errors import UserError
from llm_vtrans.export.pruning import Pruning, export_model
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.attachment import logits_of
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.preparation.planning import make_problem
from llm_vtrans.training.search import initial_shapes

SEQ_LEN = 48
ALL = ("hidden", "heads", "ffn", "layers")
WIDTHS: dict[str, Any] = {"vocab_size": 500, "num_attention_heads": 8, "num_hidden_layers": 6}
CONFIGS = {
    "llama": (
        "LlamaForCausalLM",
        LlamaConfig(**WIDTHS, hidden_size=96, intermediate_size=404, num_key_value_heads=4),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        GPT2Config(vocab_size=500, n_embd=96, n_head=8, n_layer=6, n_inner=404, n_positions=64),
    ),
    "bert": (
        "BertForSequenceClassification",
        BertConfig(**WIDTHS, hidden_size=96, intermediate_size=404, max_position_embeddings=64),
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, large enough for one unit to be below 0.1% of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    name, config = CONFIGS[request.param]
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder


def random_masks(problem: Problem) -> VIBMasks:
    shapes = initial_shapes(problem.architecture, ALL, problem.is_uniform)
    masks = VIBMasks(shapes, 0.0, seed=0)
    with torch.no_grad():
        for name in masks.names():
            spread = 3 if name != "layers" else 0
            masks.log_var[name].copy_(spread * torch.randn(masks.log_var[name].shape) - 1)
    return masks


@pytest.mark.parametrize("layout", ["stock", "per-layer"])
@pytest.mark.parametrize(
    ("given", "binding"),
    [
        ({"macs": "0.5"}, "MACs"),
        ({"macs": "0.35", "sparsity": 0.5}, "MACs"),
        ({"macs": "0.7", "sparsity": 0.6}, "params"),
    ],
)
def test_the_tighter_budget_is_met(
    dense: Path, tmp_path: Path, layout: str, given: dict[str, Any], binding: str
) -> None:
    """Counted on the exported model by torch, within 0.1% and never above."""
    args = PruneArguments(model=str(dense), layout=layout, seq_len=SEQ_LEN, **given)
    source = open_source(str(dense))
    problem = make_problem(args, source, torch.device("cpu"))
    plan = allocate(random_masks(problem), problem)
    if problem.architecture.couples_heads:
        model = load_model(source, torch.float32, torch.device("cpu"))
        tokens = torch.randint(500, (4, SEQ_LEN))
        basis = balanced_basis(model, source.architecture, [tokens], lambda batch: model(batch))
        plan = type(plan)(plan.keep, plan.gate, plan.head_dim, basis)
    pruning = Pruning(source.checkpoint, source.architecture, plan)
    export_model(pruning, source.family, source.config, problem.is_uniform, tmp_path, 10**9)
    # Eager attention: the FLOP counter does not see the fused CPU kernel.
    model = source.auto_class.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter:
        logits_of(model(torch.randint(500, (1, SEQ_LEN))))
    found = {"MACs": counter.get_total_flops() / 2, "params": model.num_parameters()}
    for limit in problem.limits:
        budget = limit.budget
        assert found[budget.kind] == limit.cost.of(plan.shape) <= budget.target
        assert sum(limit.cost.split(plan.shape).values()) == found[budget.kind]
        if budget.kind == binding:
            assert budget.target - found[budget.kind] <= 1e-3 * budget.target


@pytest.mark.parametrize(("macs", "message"), [("many", "share"), ("9T", "smaller")])
def test_bad_values(dense: Path, macs: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        args = PruneArguments(model=str(dense), macs=macs, seq_len=SEQ_LEN)
        make_problem(args, open_source(str(dense)), torch.device("cpu"))
