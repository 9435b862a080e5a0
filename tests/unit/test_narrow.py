"""Tuning on a network that was cut down: the same function, the same gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_vtrans.allocation.choosing import hard_gates
from llm_vtrans.basis.head_basis import HeadBasis, balanced_basis
from llm_vtrans.job import Job
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.tuning import Tuning
from llm_vtrans.preparation.command_line import parse
from llm_vtrans.training.distillation import SelfDistillation
from llm_vtrans.training.preemption import Preemption
from llm_vtrans.training.smaller import narrow
from tests.runs import flags, write_inputs
from tests.tiny import CONFIGS, VOCAB_SIZE, save_tiny
from tests.unit.test_exactness import random_plan

SEQ_LEN = 12
CPU = torch.device("cpu")


class Case:
    """A hard-masked network with factors and maps that are not trivial, and its teacher."""

    def __init__(self, folder: Path, name: str, seed: int, recomputes: bool = False):
        self.source = open_source(str(folder))
        self.model = load_model(self.source, torch.float32, CPU)
        architecture = self.source.architecture
        tokens = torch.randint(1, VOCAB_SIZE, (2, SEQ_LEN))
        self.inputs: dict[str, Tensor] = {
            "input_ids": tokens[None] if name.endswith("choose") else tokens
        }
        basis: HeadBasis | None = None
        if architecture.couples_heads and seed % 2:
            basis = balanced_basis(
                self.model, architecture, [self.inputs], lambda b: self.model(**b)
            )
        self.plan = random_plan(architecture, seed % 3 == 0, seed, basis=basis)
        tuning = Tuning(architecture, architecture.rotates)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in tuning.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
        self.masked = MaskedModel(self.model, architecture, tuning)
        self.distillation = SelfDistillation(self.masked, recomputes)
        self.recomputes = recomputes
        tuning.is_on = True
        self.gates = hard_gates(self.plan, CPU)

    def narrow(self) -> None:
        narrow(self.masked, self.source, self.plan, self.recomputes)

    def terms_and_gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gradients of what is in no network any more are zero."""
        tuning = self.masked.tuning
        tuning.zero_grad()
        terms = self.distillation(self.inputs, self.gates)
        terms["loss"].backward()
        return terms, {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in tuning.named_parameters()
        }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_stay(name: str, seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    case = Case(save_tiny(name, tmp_path), name, seed)
    expected, gradients = case.terms_and_gradients()
    case.narrow()
    assert case.masked.model is not case.model
    terms, found = case.terms_and_gradients()
    torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 0
    for key, gradient in gradients.items():
        assert (found[key] - gradient).abs().max() < 1e-4 * largest, key


def test_layers_that_are_recomputed(tmp_path: Path) -> None:
    folder, found = save_tiny("llama", tmp_path), []
    for recomputes in (False, True):
        torch.manual_seed(0)
        case = Case(folder, "llama", 1, recomputes)
        case.narrow()
        found.append(case.terms_and_gradients())
    torch.testing.assert_close(found[1], found[0])
    assert case.masked.model.is_gradient_checkpointing


def test_runs_come_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short the whole network is tuned: the same, but for rounding."""
    found = []
    for has_room in (True, False):
        folder = write_inputs(tmp_path / str(has_room))
        monkeypatch.setattr("llm_vtrans.job.has_room", lambda *_, room=has_room: room)
        with torch.random.fork_rng():
            job = Job.prepare(parse(flags(folder, "--sparsity", "0.4")), Preemption())
            job.load()
            job.search()
            job.allocate()
            job.tune()
        is_small = job.masked.model is not job.masked._whole[0]
        assert is_small == has_room
        found.append((job.measured.headline, job.tuning.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


def test_it_is_smaller(tmp_path: Path) -> None:
    case = Case(save_tiny("llama", tmp_path), "llama", 2)
    case.narrow()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (case.model, case.masked.model)]
    assert sizes[1] < 0.9 * sizes[0]
    assert not any(p.requires_grad for p in case.masked.model.parameters())
