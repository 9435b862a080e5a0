"""Masks over a quantised base: what is held in few bits, what stays, what is exported."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_vtrans.arguments import LOAD_FORMS
from llm_vtrans.commands.command import run_command
from llm_vtrans.loading.model import Weights, fill_model, load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.prune import prune
from tests.runs import flags, trained_tensors, write_inputs

pytestmark = [
    pytest.mark.bitsandbytes,
    pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None, reason="needs the bitsandbytes library"
    ),
]
CPU = torch.device("cpu")


def assert_near(model: torch.nn.Module, weights: Weights) -> None:
    """What every matrix of the layers does to the identity is the weight, but for rounding.

    That holds after an inference, too, and then gradients pass.
    """
    for name, (spec, _) in weights.architecture.named_tensors().items():
        if spec.sublayer is not None and len(spec.dims) == 2:
            weight = weights.read(name, torch.device("cpu"))
            module = model.get_submodule(name.removesuffix(".weight"))
            inputs = torch.eye(weight.shape[1])
            found = module(inputs).T
            error = (found - weight).norm() / weight.norm()
            assert 1e-4 < error < 0.15, (name, error)
            inputs.requires_grad_()
            (gradient,) = torch.autograd.grad(module(inputs).sum(), inputs)
            expected = weight.sum(0).expand_as(inputs)
            assert (gradient - expected).norm() < 0.15 * expected.norm(), name


@pytest.mark.parametrize(("form", "dtype"), [("4bit", torch.uint8), ("8bit", torch.int8)])
def test_layers_alone_are_quantised(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    source = open_source(str(write_inputs(tmp_path) / "model"))
    model = load_model(source, torch.float32, CPU, form=form)
    for name, (spec, _) in source.architecture.named_tensors().items():
        few = spec.sublayer is not None and len(spec.dims) == 2
        assert model.get_parameter(name).dtype == (dtype if few else torch.float32), name
    assert_near(model, Weights(source, source.architecture))

    # Filled anew under a rotation of the stream, the modules and so the hooks on them stay.
    size = source.config.hidden_size
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[0]
    modules = dict(model.named_modules())
    weights = Weights(source, source.architecture, basis, form)
    fill_model(model, weights, torch.float32, CPU)
    assert dict(model.named_modules()) == modules
    assert_near(model, weights)


@pytest.mark.parametrize("form", LOAD_FORMS[1:])
def test_export_is_cut_from_the_full_shards(tmp_path: Path, form: str) -> None:
    folder = write_inputs(tmp_path)
    arguments = flags(folder, "--load-in", form, "--rotate", "none", "--prune", "ffn")
    arguments += ["--sparsity", "0.1", "--tune-share", "0"]
    assert run_command(prune, arguments) == 0
    written = load_file(folder / "out" / "model.safetensors")
    dense = load_file(folder / "model" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert torch.equal(written[name], dense[name])
    masks = trained_tensors(folder / "out")
    kept = masks["keep.ffn"][1].bool()
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(written[name], dense[name][kept])
