"""Every baseline on cases small enough to compute by hand, and on tiny models."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from eval.baselines import BASELINES, Case, depth, flap, llm_pruner, magnitude, slicegpt, wanda
from eval.baselines.network import Moments, Network, sum_over_groups
from eval.baselines.ranking import joint_ranks, ranks, uniform_ranks
from eval.baselines.selection import Selection, hidden_sizes
from llm_vtrans.basis.rotation import Basis
from llm_vtrans.budget.cost import dense_shape, parameter_cost
from llm_vtrans.errors import UserError
from llm_vtrans.families import Axis
from llm_vtrans.families.base import Norm
from llm_vtrans.loading.source import open_source
from tests.tiny import VOCAB_SIZE, save_tiny

CPU = torch.device("cpu")
DRAW = torch.Generator().manual_seed(3)
WINDOWS = torch.randint(VOCAB_SIZE, (8, 16), generator=DRAW)
SCORES = ["random", "magnitude", "wanda-sp", "flap", "llm-pruner"]


def case(folder: Path, model: str = "llama", sparsity: float = 0.4, uniform: bool = True) -> Case:
    source = open_source(str(save_tiny(model, folder / "dense")))
    (folder / "out").mkdir()
    return Case(source, WINDOWS, WINDOWS[:2], sparsity, uniform, 0, folder / "out", CPU)


def test_wanda_by_hand() -> None:
    """Equation 1: |W_ij| * ||X_j||; inputs (3, 4) and (0, 2) have norms 5 and 2."""
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    norms = torch.tensor([5.0, 2.0])
    assert wanda.saliency(weight, norms).equal(torch.tensor([[5.0, 4.0], [15.0, 1.0]]))


def test_flap_by_hand() -> None:
    """Inputs 1, 2, 3 and 5, 5, 5: variances 1 and 0; columns of squared norms 10 and 4."""
    x = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]).double()
    found = Moments(3, x.sum(0), x.square().sum(0))
    assert found.mean.tolist() == [2, 5]
    assert found.variance.tolist() == [1, 0]
    assert found.norm.tolist() == pytest.approx([math.sqrt(14), math.sqrt(75)])
    weight = torch.tensor([[1.0, 2.0], [3.0, 0.0]]).double()
    assert flap.fluctuation(weight, found.variance).tolist() == [10, 0]
    # The second input goes: its mean 5 times its column (2, 0) is what the bias puts back.
    assert flap.lost_output(weight, found.mean, torch.tensor([True, False])).tolist() == [10, 0]
    # 1, 2, 3 has mean 2 and sample deviation 1.
    assert flap.standardise(torch.tensor([1.0, 2.0, 3.0])).tolist() == [-1, 0, 1]


def test_llm_pruner_by_hand() -> None:
    """Equation 4, first order: loss 2a - 3b has gradient (2, -3); at (5, 1) saliencies 10, 3."""
    weight = torch.tensor([5.0, 1.0], requires_grad=True)
    (2 * weight[0] - 3 * weight[1]).backward()
    assert weight.grad is not None
    assert llm_pruner.saliency(weight.detach(), weight.grad).tolist() == [10, 3]


def test_llm_pruner_protects_first_and_last_layers() -> None:
    """Of 8 layers, 4/32 are the first and 2/32 rounded up the last one."""
    importances = {"ffn": torch.arange(32.0).view(8, 4).double()}
    protected, free = llm_pruner.scores(importances, 8)
    assert free["ffn"].equal(torch.tensor([0.125, 0.375, 0.625, 0.875]).double().expand(8, 4))
    inner = protected["ffn"][1:-1]
    assert inner.equal(free["ffn"][1:-1])
    assert protected["ffn"][[0, -1]].min() > inner.max()
    assert (protected["ffn"].diff(dim=1) > 0).all()  # the order inside a layer stays


def test_shortgpt_by_hand() -> None:
    """Equation 1: cosines of (1, 0)->(0, 2) and (3, 4)->(3, 4) are 0 and 1, so 1 - 1/2."""
    before = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    after = torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    assert float(depth.block_influence(before, after)) == pytest.approx(0.5)


def test_ranks_by_hand() -> None:
    assert ranks(torch.tensor([[7.0, 1.0], [2.0, 9.0]])).tolist() == [[0.75, 0.25], [0.25, 0.75]]
    importances = {"heads": torch.tensor([[5.0, 1.0]]), "ffn": torch.tensor([[0.0, 9.0]])}
    joint = joint_ranks(importances)  # one order: 0 < 1 < 5 < 9
    assert joint["heads"].tolist() == [[0.625, 0.375]]
    assert joint["ffn"].tolist() == [[0.125, 0.875]]
    layers = {"layers": torch.tensor([[3.0], [1.0]])}  # whole layers rank among each other
    assert uniform_ranks(layers, 2)[0]["layers"].tolist() == [[0.75], [0.25]]


def test_group_sums_by_hand(tmp_path: Path) -> None:
    """With a saliency of one per weight, a unit's importance is its number of weights."""
    architecture = case(tmp_path, "llama").source.architecture
    named = architecture.named_tensors()
    counts = sum_over_groups(architecture, lambda name: torch.ones(named[name][0].shape))
    # FFN unit: rows of gate and up, column of down. Group: 2 query heads, K, V of 4 x 24, o's 8.
    assert counts["ffn"].equal(torch.full((3, 20), 3.0 * 24).double())
    assert counts["heads"].equal(torch.full((3, 3), 24.0 * (8 + 4 + 4 + 8)).double())
    # Hidden: embedding and head 2 x 96, final norm 1, per layer q 24, k 12, v 12, o 24, FFN 60, 2.
    assert counts["hidden"].equal(torch.full((24,), 193.0 + 3 * 134).double())


def test_magnitude_is_the_norm_of_a_units_weights(tmp_path: Path) -> None:
    given = case(tmp_path)
    network = Network.load(given.source, WINDOWS, CPU)
    layer = network.model.get_submodule("model.layers.1")
    parts = [layer.mlp.gate_proj.weight[7], layer.mlp.up_proj.weight[7]]
    parts.append(layer.mlp.down_proj.weight[:, 7])
    expected = torch.cat(parts).double().norm()
    assert float(magnitude.importance(network, 0)["ffn"][1, 7]) == pytest.approx(float(expected))


@pytest.mark.parametrize("name", SCORES[1:])
def test_dead_units_go_first(tmp_path: Path, name: str) -> None:
    """FFN unit 5 of layer 1 and group 2 of layer 0 write nothing and are given no weight."""
    given = case(tmp_path)
    network = Network.load(given.source, WINDOWS, CPU)
    with torch.no_grad():
        mlp = network.model.get_submodule("model.layers.1.mlp")
        mlp.down_proj.weight[:, 5] = 0
        mlp.gate_proj.weight[5] = mlp.up_proj.weight[5] = 0
        attention = network.model.get_submodule("model.layers.0.self_attn")
        attention.o_proj.weight[:, 16:] = 0  # query heads 4 and 5, of 4 entries each
        attention.q_proj.weight[16:] = 0
        attention.k_proj.weight[8:] = attention.v_proj.weight[8:] = 0
    method = BASELINES[name]
    assert isinstance(method, Selection)
    found = method.importance(network, 0)
    assert int(found["ffn"][1].argmin()) == 5
    assert int(found["heads"][0].argmin()) == 2


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", list(BASELINES))
def test_every_baseline_meets_the_budget(tmp_path: Path, name: str, uniform: bool) -> None:
    """What is counted is what the model holds, and the budget is over all parameters."""
    given = case(tmp_path, sparsity=0.3, uniform=uniform)
    pruned = BASELINES[name].prune(given)
    cost = parameter_cost(given.source.architecture)
    budget = int(0.7 * cost.of(dense_shape(given.source.architecture)))
    held = sum(p.numel() for p in pruned.model.parameters()) + pruned.added_macs
    assert held == pruned.num_params <= budget
    if name != "shortgpt":  # whole layers come in large pieces
        assert pruned.num_params > 0.93 * budget
    if uniform:
        assert pruned.pruning.plan.shape.is_uniform
    with torch.no_grad():
        assert torch.isfinite(pruned.model(WINDOWS).logits).all()


def test_flap_bias_restores_the_mean_output(tmp_path: Path) -> None:
    """On the calibration text the first write's mean error vanishes with the bias."""
    given = case(tmp_path, sparsity=0.25)
    pruned = BASELINES["flap"].prune(given)
    network = Network.load(given.source, WINDOWS, CPU)

    def mean_output(model: torch.nn.Module) -> Tensor:
        seen: list[Tensor] = []
        module = model.get_submodule("model.layers.0.self_attn.o_proj")
        handle = module.register_forward_hook(lambda _, args, output: seen.append(output))
        with torch.no_grad():
            model(WINDOWS)
        handle.remove()
        return seen[0].mean((0, 1))

    expected = mean_output(network.model)
    assert torch.allclose(mean_output(pruned.model), expected, atol=1e-3 * float(expected.norm()))
    assert "memory" in pruned.note


def test_flap_bias_of_a_narrower_stream(tmp_path: Path) -> None:
    """Behind LayerNorm nothing is folded into writes, so the bias is what they lost."""
    given = case(tmp_path, "gpt2", uniform=False)
    pruned = BASELINES["flap+hidden"].prune(given)
    network, pruning = Network.load(given.source, WINDOWS, CPU), pruned.pruning
    assert pruning is not None
    kept = pruning.kept(Axis.HIDDEN, None)
    assert len(kept) < pruning.architecture.num_units[Axis.HIDDEN]
    num_checked = 0
    for written, (name, spec, layer) in pruning.tensors().items():
        if not name.endswith(("attn.c_proj.weight", "mlp.c_proj.weight")):
            continue
        axis = flap.input_axis(spec)
        assert axis is not None
        keep = pruning.plan.keep[axis][layer]
        weight = flap.output_by_input(network.weight(name), spec)
        keep = keep.repeat_interleave(weight.shape[1] // len(keep))
        lost = flap.lost_output(weight, network.moments[name].mean, keep)[kept]
        bias = name.replace("weight", "bias")
        before = network.model.get_parameter(bias)[kept]
        found = pruned.model.get_parameter(written.replace("weight", "bias")) - before
        assert torch.allclose(found, lost.to(found), atol=1e-4 * float(lost.norm()))
        num_checked += 1
    assert num_checked


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_slicegpt_without_slicing_is_the_dense_function(tmp_path: Path, name: str) -> None:
    given = case(tmp_path, name)
    network = Network.load(given.source, WINDOWS, CPU)
    with torch.no_grad():
        expected = network.model(WINDOWS).logits
    rotated = slicegpt.rotated_architecture(network.architecture)
    bases = slicegpt.block_bases(network, rotated)
    size = rotated.num_units[Axis.HIDDEN]
    assert len(bases) == 2 * rotated.num_layers + 1
    assert not torch.allclose(bases[0].T @ bases[1], torch.eye(size), atol=0.1)
    plan = slicegpt.leading_dimensions(rotated, size)
    pruning = slicegpt.Pruning(
        given.source.checkpoint, rotated, plan, Basis.rotation(bases[0]), torch.float32
    )
    with torch.no_grad():
        actual = slicegpt.sliced_model(given, pruning, bases)(WINDOWS).logits
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_per_layer_result_that_happens_to_be_uniform_stays_one(tmp_path: Path) -> None:
    """A stock GPT-2 could not say so few heads of this width."""
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=24, n_layer=1, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    (tmp_path / "out").mkdir()
    source = open_source(str(tmp_path / "dense"))
    given = Case(source, WINDOWS, WINDOWS[:2], 0.4, False, 0, tmp_path / "out", CPU)
    pruned = BASELINES["magnitude"].prune(given)
    assert type(pruned.model).__name__ == "PerLayerGPT2LMHeadModel"


def test_slicegpt_size_by_hand(tmp_path: Path) -> None:
    """Llama of 3 layers: 595 weights a dimension (see the group sums), 2 x 3 x d^2 beside them."""
    given = case(tmp_path, sparsity=0.5)
    problem = given.problem(given.source.architecture)
    assert problem.budget.dense == 24 * 595 == 14280
    # 595 d + 6 d^2 <= 7140: 10 dimensions take 6550, 11 take 7271.
    assert slicegpt.sliced_size(problem) == 10


def test_pca_basis_by_hand(tmp_path: Path) -> None:
    """Truncation keeps the leading directions of the rotated basis, all heads and FFN units."""
    pruned = BASELINES["truncation"].prune(case(tmp_path, sparsity=0.5))
    plan = pruned.pruning.plan
    kept = int(plan.keep["hidden"].sum())
    assert kept == 7140 // 595 == 12
    assert plan.keep["hidden"][:kept].all() and plan.keep["heads"].all() and plan.keep["ffn"].all()
    assert pruned.pruning.basis is not None


def test_hidden_sizes_by_hand(tmp_path: Path) -> None:
    """From 12, where hidden dimensions do it alone, to 24, where heads and FFN units do."""
    given = case(tmp_path, sparsity=0.5)
    problem = given.problem(given.source.architecture)
    sizes = hidden_sizes(problem, frozenset({"hidden", "heads", "ffn"}))
    assert sizes == [12, 14, 16, 18, 20, 22, 24]


def test_mistakes_are_told(tmp_path: Path) -> None:
    given = case(tmp_path, sparsity=0.9)
    with pytest.raises(UserError, match="unreachable"):  # embeddings alone are more than that
        BASELINES["wanda-sp"].prune(given)
    table = given.source.architecture
    for other in (replace(table, rotates=False), replace(table, norm=Norm.LAYER)):
        fixed = replace(given, source=replace(given.source, architecture=other))
        for name in ("slicegpt", "truncation", "flap+rotation"):
            with pytest.raises(UserError, match="rotation"):
                BASELINES[name].prune(fixed)


def test_variants_share_their_score() -> None:
    """`+hidden` and `+rotation` name variants of one score."""
    for name in SCORES:
        plain, hidden, rotated = (BASELINES[f"{name}{s}"] for s in ("", "+hidden", "+rotation"))
        assert isinstance(plain, Selection) and isinstance(hidden, Selection)
        assert plain.importance is hidden.importance
        assert rotated == replace(hidden, is_rotated=True)


@pytest.mark.parametrize("name", ["wanda-sp+hidden", "magnitude+hidden"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_hidden_dimensions_where_heads_divide_them(
    tmp_path: Path, name: str, sparsity: float
) -> None:
    """GPT-2's stock config: of the hidden sizes only those that a number of heads divides."""
    pruned = BASELINES[name].prune(case(tmp_path, "gpt2", sparsity))
    assert pruned.pruning is not None
    shape = pruned.pruning.plan.shape
    assert shape.hidden < 24 and shape.hidden % max(shape.heads) == 0
