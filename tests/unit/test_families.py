"""What adapters say beyond LLaMA's: names in old files, refusals, norms, bases inside heads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.basis.head_basis import HeadBasis, balanced_basis
from llm_vtrans.budget.cost import complete, dense_shape, parameter_cost
from llm_vtrans.errors import UserError
from llm_vtrans.families import family_for
from llm_vtrans.families.base import Norm, Role, Sublayer, head_of
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.by_layer import PRESENT_LAYERS
from llm_vtrans.masking.gating import weighted_layer_norm
from tests.tiny import CONFIGS, padded, save_tiny, tiny_model

LAYER_NORM = [name for name in CONFIGS if name.startswith(("gpt2", "bert", "roberta"))]


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("bert-mlm", "")])
def test_names_of_published_files(tmp_path: Path, name: str, prefix: str) -> None:
    """GPT-2's file lacks the base model's prefix, BERT's calls norms gamma and beta."""
    folder = save_tiny(name, tmp_path)
    expected = load_model(open_source(str(folder)), torch.float32, torch.device("cpu"))
    stored = load_file(folder / "model.safetensors")
    old = {
        key.removeprefix(prefix)
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in stored.items()
    }
    assert old.keys() != stored.keys()
    save_file({**old, "bert.embeddings.position_ids": torch.ones(1)} if not prefix else old,
              folder / "model.safetensors")  # fmt: skip
    model = load_model(open_source(str(folder)), torch.float32, torch.device("cpu"))
    for left, right in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_old_buffers_and_settings_that_a_class_ignores(tmp_path: Path) -> None:
    """Frequencies were stored, by layer or once; Mistral's and Qwen2's biases are settled."""
    for name in ("mistral", "qwen2"):
        folder = save_tiny(name, tmp_path / name)
        for key in ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"):
            path = folder / "model.safetensors"
            save_file({**load_file(path), key: torch.ones(2)}, path)
        config = json.loads((folder / "config.json").read_text())
        config |= {"attention_bias": True, "mlp_bias": True}
        (folder / "config.json").write_text(json.dumps(config))
        source = open_source(str(folder))
        model = load_model(source, torch.float32, torch.device("cpu"))
        stock = AutoModelForCausalLM.from_pretrained(folder)
        assert parameter_cost(source.architecture).of(dense_shape(source.architecture)) == (
            stock.num_parameters()
        )
        for left, right in zip(model.parameters(), stock.parameters(), strict=True):
            assert torch.equal(left, right)


def test_unknown_heads_are_refused() -> None:
    config = type(CONFIGS["bert-mlm"])(architectures=["BertForTokenClassification"])
    with pytest.raises(UserError, match="BertForTokenClassification"):
        head_of(config)
    with pytest.raises(UserError, match="inverse_layer_idx"):
        family_for("gpt2").describe(type(CONFIGS["gpt2"])(scale_attn_by_inverse_layer_idx=True))


@pytest.mark.parametrize("name", ["bert-mlm", "roberta-mlm"])
def test_an_absent_sublayer_adds_no_noise_to_the_stream(name: str) -> None:
    """Behind a post-norm that is not there, a noisy gate would let the stream grow."""
    model = tiny_model(name)
    masked = MaskedModel(model, family_for(model.config.model_type).describe(model.config))
    tokens = torch.randint(1, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    gates = {"layers": torch.ones(3, 2), PRESENT_LAYERS: torch.ones(3, 2)}
    states = []
    for gate in (0.0, 50.0):
        gates["layers"][1] = gate
        gates[PRESENT_LAYERS][1] = 0.0
        masked.set_gates(gates)
        states.append(model(tokens, output_hidden_states=True).hidden_states)
    for quiet, noisy in zip(*states, strict=True):
        torch.testing.assert_close(quiet, noisy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[1][2], states[1][1], rtol=1e-4, atol=1e-4)
    gates[PRESENT_LAYERS][:] = 0.5  # half there: between the stream and what a norm gives
    masked.set_gates({**gates, "layers": torch.full((3, 2), 50.0)})
    largest = [float(x.abs().max()) for x in model(tokens, output_hidden_states=True).hidden_states]
    bound = 24**0.5 * max(float(p.abs().max()) for n, p in model.named_parameters() if "Norm" in n)
    assert max(largest) <= max(bound, largest[0]) + 1


def test_layer_norm_over_present_dimensions() -> None:
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(12), torch.randn(5, 12)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(12))
        norm.bias.copy_(torch.rand(12))
    torch.testing.assert_close(weighted_layer_norm(x, norm, torch.ones(12)), norm(x))
    kept = torch.arange(12) % 3 > 0
    smaller = nn.functional.layer_norm(x[:, kept], (8,), norm.weight[kept], norm.bias[kept])
    found = weighted_layer_norm(x, norm, kept.float())
    torch.testing.assert_close(found[:, kept], smaller)
    assert not found[:, ~kept].any()


@pytest.mark.parametrize("name", LAYER_NORM)
@torch.no_grad()
def test_open_gates_leave_the_function(name: str) -> None:
    architecture = family_for(CONFIGS[name].model_type).describe(CONFIGS[name])
    assert architecture.norm is Norm.LAYER and architecture.couples_heads
    masked = MaskedModel(tiny_model(name), architecture)
    shape = (1, 2, 20) if name.endswith("choose") else (2, 20)
    tokens = torch.randint(1, 90, shape, generator=torch.Generator().manual_seed(0))
    dense = masked(tokens)
    ones = complete({"layers": torch.ones(1, 1)}, architecture)
    keep = {n: t.bool() for n, t in ones.items() if n != "layers"}
    masked.set_gates(PrunePlan(keep, ones).hard())
    torch.testing.assert_close(masked(tokens), dense, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_head_basis_orders_what_heads_do() -> None:
    """All dimensions: the function; fewer: an error that the basis keeps below the old one's."""
    config = CONFIGS["gpt2"]
    architecture = family_for(config.model_type).describe(config)
    model = tiny_model("gpt2")
    tokens = torch.randint(1, 90, (8, 20), generator=torch.Generator().manual_seed(0))
    basis = balanced_basis(model, architecture, [tokens], lambda batch: model(batch))
    width = architecture.head_dim
    assert width == 6
    whole = basis.projectors(width)
    for maps in whole.values():
        torch.testing.assert_close(maps, torch.eye(width).expand_as(maps), rtol=0, atol=1e-3)
    assert bool((basis.retained.diff() > 0).all()) and float(basis.retained[-1]) == pytest.approx(1)
    masked = MaskedModel(model, architecture)
    dense = masked(tokens)

    def error(projectors: dict[Role, torch.Tensor]) -> float:
        named = {f"heads.{role}": maps for role, maps in projectors.items()}
        masked.set_gates(named)
        return float((masked(tokens) - dense).square().mean())

    errors = [error(basis.projectors(n)) for n in (5, 4, 2)]
    assert errors == sorted(errors)
    first = torch.diag((torch.arange(width) < 4).float())
    plain = {role: first.expand_as(maps) for role, maps in whole.items()}
    assert errors[1] < error(plain)


def test_every_sublayer_has_its_rows() -> None:
    for name, config in CONFIGS.items():
        rows = family_for(config.model_type).describe(config).tensors
        assert {row.sublayer for row in rows} >= set(Sublayer), name


@pytest.mark.parametrize("name", ["bert-classify", "bert-choose", "gpt2-classify"])
def test_head_basis_sees_no_padding(name: str) -> None:
    model = tiny_model(name)
    architecture = family_for(model.config.model_type).describe(model.config)

    def basis(num_padding: int) -> HeadBasis:
        batch = padded(num_padding)
        if name.endswith("choose"):
            batch = {key: tensor.unflatten(0, (-1, 2)) for key, tensor in batch.items()}
        return balanced_basis(model, architecture, [batch], lambda b: model(**b))

    torch.testing.assert_close(basis(0).retained, basis(26).retained, rtol=1e-4, atol=1e-5)
