"""Least-squares recovery: exact where the pruned inputs suffice, and never worse held out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.basis.rotation import Basis, rotate_model, rotated_architecture
from llm_vtrans.budget.cost import complete
from llm_vtrans.errors import UserError
from llm_vtrans.export.pruning import Pruning, export_model
from llm_vtrans.families import Axis
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.recovery.methods import recovery_for
from llm_vtrans.recovery.methods.least_squares import Moments, recover, solve
from llm_vtrans.recovery.training import RecoveryRun
from llm_vtrans.tasks.encoding import Examples
from tests.tiny import VOCAB_SIZE, save_tiny

WINDOWS = torch.randint(VOCAB_SIZE, (16, 24), generator=torch.Generator().manual_seed(1))
EXAMPLES = Examples({"input_ids": WINDOWS})
RUN = RecoveryRun.alone(WINDOWS.shape[1], seed=0)


def moments(inputs: torch.Tensor, targets: torch.Tensor) -> Moments:
    new = Moments.empty(inputs.shape[1], targets.shape[1], inputs.device)
    new.add(inputs, targets)
    return new


def test_by_hand() -> None:
    """One input, one output: targets 2x, weight 1; with ridge r, W = 1 + 14 / (14 + 14 r)."""
    x = torch.tensor([[1.0], [2.0], [3.0]])
    found = moments(x, 2 * x)
    assert float(found.inputs) == 14 and float(found.cross) == 28 and float(found.targets) == 56
    assert found.error(torch.ones(1, 1).double()) == pytest.approx(14)  # 1 + 4 + 9
    solution = solve(found, found, torch.ones(1, 1).double())
    assert float(solution) == pytest.approx(1 + 1 / (1 + 1e-6), abs=1e-12)  # least ridge fits best


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_held_out_error_never_grows(seed: int, num_in: int, num_out: int, tokens: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    exported = normal(num_out, num_in)
    train = moments(normal(tokens, num_in), normal(tokens, num_out))
    heldout = moments(normal(tokens, num_in), normal(tokens, num_out))
    assert heldout.error(solve(train, heldout, exported)) <= heldout.error(exported)


def halved(folder: Path, name: str, basis: bool = False, hidden: int = 24):
    """Dense and exported model with a third of FFN units and heads gone, and its pruning."""
    source = open_source(str(save_tiny(name, folder / "dense")))
    architecture = source.architecture
    rotation = None
    if basis:
        architecture = rotated_architecture(architecture)
        size = architecture.num_units[Axis.HIDDEN]
        rotation = torch.linalg.qr(torch.randn(size, size))[0]
    whole = complete({"layers": torch.ones(1, 1)}, architecture)
    keep = {n: v.bool().clone() for n, v in whole.items() if n != "layers"}
    keep["ffn"][:, ::3] = False
    keep["heads"][:, 0] = False
    keep["hidden"] = torch.arange(24) < hidden
    pruning = Pruning(
        source.checkpoint,
        architecture,
        PrunePlan(keep, whole),
        None if rotation is None else Basis.rotation(rotation),
        torch.float32,
    )
    (folder / "pruned").mkdir()
    export_model(pruning, source.family, source.config, False, folder / "pruned", 10**9)
    pruned = AutoModelForCausalLM.from_pretrained(folder / "pruned", dtype=torch.float32).eval()
    return load_model(source, torch.float32, torch.device("cpu")), pruned, pruning


def test_recovers_exactly_when_the_inputs_suffice(tmp_path: Path) -> None:
    """FFN unit 0 of each layer doubles unit 1's input, so without it nothing is lost."""
    dense, pruned, pruning = halved(tmp_path, "llama")
    # Unpruned heads: restore them, so that only determined FFN units are missing.
    source_folder = pruning.source.folder
    for layer in dense.model.layers:
        for index in range(0, 20, 3):
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[index] = projection.weight[(index + 1) % 20]
    dense.save_pretrained(source_folder)
    source = open_source(str(source_folder))
    keep = {**pruning.plan.keep, "heads": torch.ones(3, 3).bool()}
    keep["ffn"] = torch.ones(3, 20).bool()
    keep["ffn"][:, :18:3] = False
    plan = PrunePlan(keep, pruning.plan.gate)
    pruning = Pruning(source.checkpoint, source.architecture, plan, None, torch.float32)
    (tmp_path / "other").mkdir()
    export_model(pruning, source.family, source.config, True, tmp_path / "other", 10**9)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32)
    with torch.no_grad():
        expected, before = dense(WINDOWS).logits, pruned(WINDOWS).logits
        after = recover(dense, pruned, pruning, EXAMPLES, RUN)(WINDOWS).logits
    scale = expected.abs().max()
    assert (before - expected).abs().max() > 0.05 * scale
    assert (after - expected).abs().max() < 1e-3 * scale


@pytest.mark.parametrize(
    ("name", "basis", "hidden"),
    [
        ("llama", False, 24),
        ("llama-bias", False, 20),
        ("qwen2", True, 20),
        ("llama-tied", True, 16),
    ],
)
def test_first_matrix_error_falls(tmp_path: Path, name: str, basis: bool, hidden: int) -> None:
    """On the windows of the first matrix, in the dense stream's kept directions and scale."""
    dense, pruned, pruning = halved(tmp_path, name, basis, hidden)

    def attention(model: torch.nn.Module) -> torch.Tensor:
        seen = []
        module = model.get_submodule("model.layers.0.self_attn.o_proj")
        handle = module.register_forward_hook(lambda _, args, output: seen.append(output))
        with torch.no_grad():
            model(WINDOWS)
        handle.remove()
        return seen[0]

    target = attention(dense)
    writer = pruning.architecture.row("model.layers.{}.self_attn.o_proj.weight")
    target = target @ pruning.basis.at(writer, 0)[:, :hidden] if basis else target[..., :hidden]
    target = target * (hidden / 24) ** 0.5
    before = (attention(pruned) - target).square().sum()
    with torch.no_grad():
        recover(dense, pruned, pruning, EXAMPLES, RUN)
    assert (attention(pruned) - target).square().sum() < 0.97 * before


def test_unpruned_model_stays_as_it_is(tmp_path: Path) -> None:
    dense, _, pruning = halved(tmp_path, "mistral")
    gate = complete({"layers": torch.ones(1, 1)}, pruning.architecture)
    keep = {name: value.bool() for name, value in gate.items() if name != "layers"}
    whole = Pruning(pruning.source, pruning.architecture, PrunePlan(keep, gate))
    copy = AutoModelForCausalLM.from_pretrained(pruning.source.folder, dtype=torch.float32)
    recover(dense, copy, whole, EXAMPLES, RUN)
    with torch.no_grad():
        difference = (copy(WINDOWS).logits - dense(WINDOWS).logits).abs().max()
    assert difference < 1e-4 * dense(WINDOWS).logits.abs().max()


@pytest.mark.parametrize("name", ["llama", "llama-bias"])
def test_what_takes_the_answers_away_is_not_taken(tmp_path: Path, name: str) -> None:
    """Of a network that answers as the dense one does, by other numbers in its stream."""
    dense, _, pruning = halved(tmp_path, name)
    whole = complete({"layers": torch.ones(1, 1)}, pruning.architecture)
    keep = {n: value.bool() for n, value in whole.items() if n != "layers"}
    pruning = Pruning(pruning.source, pruning.architecture, PrunePlan(keep, whole))
    other = load_model(open_source(str(pruning.source.folder)), torch.float32, torch.device("cpu"))
    basis = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(2)))[0]
    rotate_model(other, pruning.architecture, basis)
    before = {n: tensor.clone() for n, tensor in other.state_dict().items()}
    said: list[str] = []
    recover(dense, other, pruning, EXAMPLES, replace(RUN, say=said.append))
    assert all(torch.equal(tensor, before[n]) for n, tensor in other.state_dict().items())
    assert [line.endswith("on 2 held-out windows: not taken") for line in said] == [True]


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="least-squares"):
        recovery_for("magic")
