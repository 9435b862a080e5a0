"""The basis of the rotation: orthogonal, and ordered by the stream's second moment."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llm_vtrans.basis.rotation import level, principal_basis, rotate_model
from llm_vtrans.families import Axis, family_for
from llm_vtrans.families.base import Norm, Stream
from llm_vtrans.loading.model import Weights, fill_model, load_model
from llm_vtrans.loading.source import open_source
from tests.tiny import VOCAB_SIZE, padded, save_tiny, tiny_model
from tests.unit.test_exactness import random_rotation


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_principal_basis_diagonalises_the_normalised_stream(name: str) -> None:
    model = tiny_model(name)
    architecture = family_for(name).describe(model.config)
    batches = list(torch.randint(VOCAB_SIZE, (4, 2, 16)).unbind())
    basis = principal_basis(model, architecture, batches, model)
    size = architecture.num_units[Axis.HIDDEN]
    assert torch.allclose(basis.T @ basis, torch.eye(size), atol=1e-5)

    seen: list[Tensor] = []
    for tensor, (spec, _) in architecture.named_tensors().items():
        if spec.stream is Stream.SCALES:
            norm = model.get_submodule(tensor.removesuffix(".weight"))
            norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    stream = torch.cat([x.flatten(0, 1) for x in seen])
    if architecture.norm is Norm.LAYER:  # coordinates have the mean of what they stand for
        torch.testing.assert_close(basis.sum(0), torch.ones(size))
        basis = basis @ level(size).float()
        stream = stream - stream.mean(-1, keepdim=True)
    normalised = stream / stream.square().mean(-1, keepdim=True).sqrt()
    moment = basis.T @ (normalised.T @ normalised) @ basis
    energy = moment.diagonal()
    assert (energy[:-1] >= energy[1:] - 1e-3).all()
    assert (moment - energy.diag()).abs().max() < 1e-3 * energy.max()


@pytest.mark.parametrize("name", ["llama-classify", "gpt2-classify"])
def test_padding_turns_no_direction(name: str) -> None:
    """Nor does a mask that hides nothing, to the last digit."""
    model = tiny_model(name)
    architecture = family_for(model.config.model_type).describe(model.config)
    unmasked = {"input_ids": padded(0)["input_ids"]}
    bare, whole, longer = (
        principal_basis(model, architecture, [batch], lambda b: model(**b))
        for batch in (unmasked, padded(0), padded(26))
    )
    assert torch.equal(bare, whole)
    leading, other = bare[:, :8], longer[:, :8]
    torch.testing.assert_close(leading @ leading.T, other @ other.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_loading_rotates_as_the_loaded_model_is_rotated(tmp_path: Path, name: str) -> None:
    source = open_source(str(save_tiny(name, tmp_path)))
    table, cpu = source.architecture, torch.device("cpu")
    rotation = random_rotation(table.num_units[Axis.HIDDEN], 0, table.norm)
    one, other = (load_model(source, torch.float32, cpu) for _ in range(2))
    rotate_model(one, table, rotation)
    fill_model(other, Weights(source, table, rotation), torch.float32, cpu)
    for parameter in table.named_tensors():
        torch.testing.assert_close(one.get_parameter(parameter), other.get_parameter(parameter))


@given(st.integers(2, 40))
def test_level(size: int) -> None:
    matrix = level(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double())
    torch.testing.assert_close(matrix[:, -1], torch.full((size,), size**-0.5).double())
    torch.testing.assert_close(matrix[:, :-1].sum(0), torch.zeros(size - 1).double())
