"""Recovery by distillation, in memory: the loss falls, adapters merge exactly, what is refused."""

import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from eval.baselines import slicegpt
from llm_vtrans.arguments import PruneArguments
from llm_vtrans.errors import UserError
from llm_vtrans.loading.checkpoint import SINGLE_FILE, Checkpoint
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.recovery.methods import lora, recovery_for
from llm_vtrans.recovery.stage import check_recoverable, check_recovery, rewrite
from llm_vtrans.recovery.training import RecoveryRun, default_steps
from llm_vtrans.training.distillation_loss import distillation_loss
from tests.tiny import save_tiny, tiny_model
from tests.unit.test_baselines import case
from tests.unit.test_least_squares import EXAMPLES, WINDOWS, halved

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="needs the peft library"
)
TRAINED = ["full", pytest.param("lora", marks=needs_peft)]


def run(num_steps: int) -> RecoveryRun:
    return RecoveryRun.alone(WINDOWS.shape[1], seed=0, num_steps=num_steps)


@torch.no_grad()
def distance(dense: torch.nn.Module, pruned: torch.nn.Module) -> float:
    return float(distillation_loss(pruned(WINDOWS).logits, dense(WINDOWS).logits))


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_falls(tmp_path: Path, name: str, family: str) -> None:
    source = open_source(str(save_tiny(family, tmp_path)))
    dense = load_model(source, torch.float32, torch.device("cpu"))
    pruned = tiny_model(family).requires_grad_(False)
    with torch.no_grad():  # something that weights of the layers can mend
        for parameter in pruned.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    before, names = distance(dense, pruned), [n for n, _ in pruned.named_parameters()]
    recovered = recovery_for(name).recover(dense, pruned, None, EXAMPLES, run(40))  # type: ignore[arg-type]
    assert distance(dense, recovered) < 0.8 * before
    assert [n for n, _ in recovered.named_parameters()] == names
    assert not any(parameter.requires_grad for parameter in recovered.parameters())


@pytest.mark.parametrize("name", TRAINED)
def test_a_per_layer_network_recovers(tmp_path: Path, name: str) -> None:
    dense, pruned, pruning = halved(tmp_path, "llama-tied", hidden=20)
    before = distance(dense, pruned)
    recovered = recovery_for(name).recover(dense, pruned, pruning, EXAMPLES, run(30))
    assert distance(dense, recovered) < before


@pytest.mark.parametrize("name", TRAINED)
def test_a_network_with_hooks_recovers(tmp_path: Path, name: str) -> None:
    """SliceGPT's residual matrices stay as they are and in force."""
    given = case(tmp_path)
    pruned = slicegpt.SliceGPT().prune(given)
    dense = load_model(given.source, torch.float32, torch.device("cpu"))
    before = distance(dense, pruned.model)
    recovered = recovery_for(name).recover(dense, pruned.model, pruned.pruning, EXAMPLES, run(30))
    assert distance(dense, recovered) < before


@needs_peft
@pytest.mark.parametrize("family", ["llama-bias", "gpt2", "bert-classify"])
def test_merged_weights_are_the_adapters(family: str) -> None:
    model = tiny_model(family).requires_grad_(False)
    modules = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        dense = model(WINDOWS).logits
        tuner = lora.with_adapters(model, seed=0)
        assert torch.equal(model(WINDOWS).logits, dense)  # fresh adapters sum to zero
        for parameter in lora.parameters(tuner):
            parameter.copy_(0.1 * torch.randn_like(parameter))
        adapted = model(WINDOWS).logits
        merged = lora.merged(tuner)
        assert [name for name, _ in merged.named_modules()] == modules
        found = merged(WINDOWS).logits
    assert (adapted - dense).abs().max() > 0.1 * dense.abs().max()
    torch.testing.assert_close(found, adapted, rtol=1e-4, atol=1e-4 * float(dense.abs().max()))


@needs_peft
def test_adapters_of_a_seed_are_the_same() -> None:
    first, second = (
        lora.parameters(lora.with_adapters(tiny_model("llama"), seed=3)) for _ in range(2)
    )
    assert len(first) == 2 * 3 * 7  # A and B of seven matrices in three layers
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="belongs to --recover lora or full"):
        PruneArguments(recover_steps=5, recover="least-squares")
    with pytest.raises(UserError, match="--recover-steps must be at least 0"):
        PruneArguments(recover_steps=-1, recover="full")
    with pytest.raises(UserError, match="float16"):
        check_recovery(PruneArguments(recover="full", dtype="float16"), Accelerator())
    for name in ("gpt2", "llama-classify"):
        source = open_source(str(save_tiny(name, tmp_path / name)))
        with pytest.raises(UserError, match="take --recover lora or full"):
            check_recoverable(PruneArguments(recover="least-squares"), source)


def test_default_steps_are_a_budget_of_tokens() -> None:
    assert default_steps(batch_size=8, seq_len=256) == 512
    assert default_steps(batch_size=16, seq_len=512) == 128
    assert default_steps(batch_size=4096, seq_len=4096) == 1


def test_other_ranks_keep_away_from_what_rank_zero_replaces(tmp_path: Path) -> None:
    """Between two of its steps there is no checkpoint."""
    folder = save_tiny("llama", tmp_path)
    stored = Checkpoint.open(folder).tensors
    (folder / SINGLE_FILE).unlink()
    assert rewrite(folder, stored, tiny_model("llama"), {}, 2**20, is_main=False) == {}
