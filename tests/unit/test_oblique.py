"""The oblique basis: the projector of least loss, and what observes the network."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_vtrans.basis import oblique
from llm_vtrans.basis.oblique import RIDGE, LevelBasis, ObliqueBasis, TiedBasis, oblique_basis
from llm_vtrans.basis.rotation import FinalNorm, level, rotate_model
from llm_vtrans.budget.cost import complete
from llm_vtrans.families.base import Place
from llm_vtrans.loading.model import final_norm, load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.tuning import Tuning
from tests.tiny import VOCAB_SIZE, padded, save_tiny
from tests.unit.test_exactness import random_rotation

WIDTH = 12


def random_moment(generator: torch.Generator) -> Tensor:
    root = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    moment = root @ root.T
    return moment / moment.diagonal().mean()


def loss(basis: ObliqueBasis, projector: Tensor) -> float:
    rest = torch.eye(WIDTH, dtype=torch.float64) - projector
    fisher = basis.fisher + RIDGE * torch.eye(WIDTH)
    return float((fisher @ rest @ basis.inputs @ rest.T).trace())


@given(st.integers(0, 2**31), st.integers(1, WIDTH))
def test_least_loss(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = ObliqueBasis(random_moment(generator), random_moment(generator))
    maps = basis.maps(size)
    write, read = maps[Place.WRITE][:size].double(), maps[Place.READ][:, :size].double()
    projector = read @ write
    torch.testing.assert_close(projector @ projector, projector, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read.T @ read, torch.eye(size).double(), rtol=0, atol=1e-5)
    least = loss(basis, projector)
    _, vectors = torch.linalg.eigh(basis.inputs)
    principal = vectors[:, -size:]
    assert least <= loss(basis, principal @ principal.T) + 1e-5
    for _ in range(5):  # no other projector of this rank, near by or far, loses less
        for distance in (0.01, 1.0):
            shift = torch.randn(WIDTH, size, dtype=torch.float64, generator=generator)
            other = read + distance * shift
            assert least <= loss(basis, other @ torch.linalg.pinv(other)) + 1e-5
            assert least <= loss(basis, other @ torch.linalg.inv(write @ other) @ write) + 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_observed_moments(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path)
    source = open_source(str(tmp_path))
    model = load_model(source, torch.float32, torch.device("cpu"))
    masked = MaskedModel(model, source.architecture)
    seen: list[Tensor] = []
    norm = model.get_submodule(source.architecture.final_norm.removesuffix(".weight"))
    tokens = torch.randint(VOCAB_SIZE, (4, 8), generator=torch.Generator().manual_seed(0))
    basis = oblique_basis(masked, source.architecture, [{"input_ids": tokens}], 0)
    again = oblique_basis(masked, source.architecture, [{"input_ids": tokens}], 0)
    assert isinstance(basis, ObliqueBasis) and isinstance(again, ObliqueBasis)
    assert torch.equal(basis.fisher, again.fisher)
    for moment in (basis.inputs, basis.fisher):
        assert float(moment.diagonal().mean()) == pytest.approx(1)
        assert float(torch.linalg.eigvalsh(moment).min()) > -1e-6
        assert int(torch.linalg.matrix_rank(moment)) > 1
    # Nothing is left on the network.
    handle = norm.register_forward_hook(lambda _, __, output: seen.append(output))
    masked(tokens)
    handle.remove()
    assert not seen[0].requires_grad and len(norm._forward_hooks) <= 1


def test_padding_is_not_observed(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama-classify", tmp_path)))
    masked = MaskedModel(
        load_model(source, torch.float32, torch.device("cpu")), source.architecture
    )
    basis, other = (oblique_basis(masked, source.architecture, [padded(n)], 0) for n in (0, 26))
    assert isinstance(basis, ObliqueBasis) and isinstance(other, ObliqueBasis)
    torch.testing.assert_close(basis.inputs, other.inputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(basis.fisher, other.fisher, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**31), st.integers(1, WIDTH))
def test_tied_basis(seed: int, size: int) -> None:
    """All directions together compute the dense head."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.2 + torch.rand(WIDTH, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator).double())[0]
    norm, moment = FinalNorm.rotated(weights, None, rotation).matrix, random_moment(generator)
    basis = TiedBasis(moment, random_moment(generator), norm)
    maps = {place: matrix.double() for place, matrix in basis.maps(size).items()}
    table, read, factors = maps[Place.WRITE].T, maps[Place.READ], maps[Place.END]
    identity = torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(table * factors[0] @ table.T, norm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read @ table.T, identity, rtol=1e-4, atol=1e-4)
    written = table.T @ moment @ table  # norms see the length that they saw
    assert float(written.trace()) == pytest.approx(float(moment.trace()), rel=1e-4)


@given(st.integers(0, 2**31), st.integers(1, WIDTH))
def test_tied_basis_where_moments_commute(seed: int, size: int) -> None:
    """It drops the directions that cost least: variance times Fisher information."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator).double())[0]
    inputs, fisher = torch.rand(2, WIDTH, dtype=torch.float64, generator=generator) + 0.01
    moments = [axes * values @ axes.T for values in (inputs, fisher)]
    basis = TiedBasis(*moments, 1.7 * torch.eye(WIDTH))
    maps = basis.maps(size)
    projector = (maps[Place.READ][:, :size] @ maps[Place.WRITE][:size]).double()
    costs = (inputs * (fisher + RIDGE)).sort().values
    assert loss(basis, projector) == pytest.approx(float(costs[: WIDTH - size].sum()), abs=1e-4)


@given(st.integers(0, 2**31), st.integers(2, WIDTH + 1))
def test_level_basis(seed: int, size: int) -> None:
    """The projection of the directions without mean; the mean itself stays the mean."""
    generator = torch.Generator().manual_seed(seed)
    inner = TiedBasis(*(random_moment(generator) for _ in range(3)))
    shift = torch.randn(WIDTH + 1, generator=generator)
    maps = LevelBasis(inner, shift).maps(size)
    write, read = maps[Place.WRITE], maps[Place.READ]
    assert not write[size:].any() and not read[:, size:].any()
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    length = ((WIDTH + 1) / size) ** 0.5
    close(write.sum(0) * length, torch.ones(WIDTH + 1))
    close(read.sum(1) * length, torch.ones(WIDTH + 1))
    outer, found = level(WIDTH + 1).float(), inner.maps(size - 1)
    projector = found[Place.READ][:, : size - 1] @ found[Place.WRITE][: size - 1]
    close(read @ write, outer @ torch.block_diag(projector, torch.ones(1, 1)) @ outer.T)
    factors, added = maps[Place.END]
    close(factors, found[Place.END][0, :1].expand(WIDTH + 1))
    rest = shift - write.T @ added  # what the head's part of the table cannot express
    close(write @ rest, torch.zeros(WIDTH + 1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["llama-tied", "gemma", "gpt2"])
def test_a_tied_head_in_other_directions(tmp_path: Path, family: str) -> None:
    """Where the final norm weighs all dimensions alike no norm sees another length: exact."""
    dense = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path))
    source = open_source(str(tmp_path))
    table = source.architecture
    norm = table.row(table.final_norm)
    with torch.no_grad():
        dense.get_parameter(norm.name).fill_(1.7 - norm.offset)
        dense.save_pretrained(tmp_path)
        tokens = torch.randint(VOCAB_SIZE, (4, 8), generator=torch.Generator().manual_seed(0))
        expected = dense(tokens).logits
    source = open_source(str(tmp_path))
    model = load_model(source, torch.float32, torch.device("cpu"))
    tuning = Tuning(table, is_rotated=True)
    masked = MaskedModel(model, table, tuning)
    rotation = random_rotation(24, 0, table.norm)
    rotate_model(model, table, rotation)
    tuning.tie(final_norm(source.checkpoint, table, rotation))
    basis = oblique_basis(masked, table, [{"input_ids": tokens}], 0)
    assert isinstance(basis, TiedBasis | LevelBasis)
    tuning.start(basis.maps(24))
    masked.set_gates(complete({"layers": torch.ones(1, 1)}, table))
    torch.testing.assert_close(masked(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_a_tied_head_has_its_basis_without_fisher_information(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Where gradients overflow, variance alone decides: the model cannot do without."""
    source = open_source(str(save_tiny(family, tmp_path)))
    table, cpu = source.architecture, torch.device("cpu")
    masked = MaskedModel(
        load_model(source, torch.float32, cpu), table, Tuning(table, is_rotated=True)
    )
    masked.tuning.tie(final_norm(source.checkpoint, table, torch.eye(24)))
    rotate_model(masked.model, table, torch.eye(24))
    monkeypatch.setattr(oblique, "_surprise", lambda logits, seed: 1e30 * logits.sum() * 1e30)
    tokens = torch.randint(VOCAB_SIZE, (4, 8), generator=torch.Generator().manual_seed(0))
    basis = oblique_basis(masked, table, [{"input_ids": tokens}], 0)
    assert basis is not None
    assert all(bool(torch.isfinite(matrix).all()) for matrix in basis.maps(12).values())
