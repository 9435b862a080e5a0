"""The basis of the rotation: orthogonal, and ordered by the stream's second moment."""

import torch
from torch import Tensor

from llm_vtrans.basis.rotation import principal_basis
from llm_vtrans.families import Axis, family_for
from tests.tiny import VOCAB_SIZE, tiny_model


def test_principal_basis_diagonalises_the_normalised_stream() -> None:
    model = tiny_model("llama")
    architecture = family_for("llama").describe(model.config)
    batches = list(torch.randint(VOCAB_SIZE, (4, 2, 16)).unbind())
    basis = principal_basis(model, architecture, batches, model)
    size = architecture.num_units[Axis.HIDDEN]
    assert torch.allclose(basis.T @ basis, torch.eye(size), atol=1e-5)

    seen: list[Tensor] = []
    norms = [m for n, m in model.named_modules() if n.endswith("layernorm") or n == "model.norm"]
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    stream = torch.cat([x.flatten(0, 1) for x in seen])
    normalised = stream / stream.square().mean(-1, keepdim=True).sqrt()
    moment = basis.T @ (normalised.T @ normalised) @ basis
    energy = moment.diagonal()
    assert (energy[:-1] >= energy[1:] - 1e-3).all()
    assert (moment - energy.diag()).abs().max() < 1e-3 * energy.max()
