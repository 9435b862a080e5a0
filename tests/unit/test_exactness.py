"""The exported network is the hard-masked, tuned one: functions, counts, layouts, caches."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.basis.head_basis import HeadBasis, balanced_basis
from llm_vtrans.basis.rotation import level, rotate_model, rotated_architecture
from llm_vtrans.budget.cost import mac_cost, parameter_cost
from llm_vtrans.export.pruning import Pruning, export_config, export_model
from llm_vtrans.families import Architecture, Axis
from llm_vtrans.families.base import Norm, head_of
from llm_vtrans.families.layouts import PER_LAYER_MODULE
from llm_vtrans.loading.model import final_norm, load_model
from llm_vtrans.loading.source import Source, open_source
from llm_vtrans.masking.attachment import MaskedModel, logits_of
from llm_vtrans.masking.tuning import MAP_NUMBERS, Tuning
from tests.tiny import CONFIGS, VOCAB_SIZE, save_tiny

TOLERANCE = 1e-4  # largest logit difference over the largest logit, float32
SEQ_LEN = 20


@pytest.fixture(scope="module", params=CONFIGS)
def source_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("dense"))


def random_plan(
    architecture: Architecture,
    is_uniform: bool,
    seed: int,
    prunes_hidden: bool = True,
    basis: HeadBasis | None = None,
) -> PrunePlan:
    """Random kept units and gates; sub-layers removed, in the stock layout with their layer."""
    draw = torch.Generator().manual_seed(seed)
    layers, units = architecture.num_layers, architecture.num_units

    def number(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=draw))

    def some(num_units: int, count: int) -> torch.Tensor:
        keep = torch.zeros(num_units, dtype=torch.bool)
        keep[torch.randperm(num_units, generator=draw)[:count]] = True
        return keep

    def counts(num_units: int) -> torch.Tensor:
        drawn = torch.randint(1, num_units + 1, (layers,), generator=draw)
        return drawn[:1].expand(layers) if is_uniform else drawn

    present = torch.rand(layers, 2, generator=draw) < 0.7
    present[0, 0] = True  # the first attention always stays
    if is_uniform:
        present = present[:, :1].expand(layers, 2)
    heads, ffn = counts(units[Axis.HEADS]), counts(units[Axis.FFN])
    hidden = number(4, units[Axis.HIDDEN]) if prunes_hidden else units[Axis.HIDDEN]
    head_dim = None
    if architecture.couples_heads and is_uniform:
        assert architecture.head_dim is not None
        if prunes_hidden:
            head_dim = number(1, architecture.head_dim)
        else:
            heads = torch.full((layers,), units[Axis.HEADS])
        hidden = int(heads[0]) * (head_dim or architecture.head_dim)
    keep = {
        "hidden": some(units[Axis.HIDDEN], hidden),
        "heads": torch.stack([some(units[Axis.HEADS], int(n)) for n in heads * present[:, 0]]),
        "ffn": torch.stack([some(units[Axis.FFN], int(n)) for n in ffn * present[:, 1]]),
    }
    gates = {**{n: k.shape for n, k in keep.items()}, "layers": (layers, 2)}
    gate = {n: 0.5 + torch.rand(shape, generator=draw) for n, shape in gates.items()}
    if not prunes_hidden:
        gate["hidden"] = torch.ones_like(gate["hidden"])
    return PrunePlan(keep, gate, head_dim, basis)


def inputs_for(config: Any, seed: int, num: int = 2, choices: int = 3) -> dict[str, torch.Tensor]:
    """Tokens for any head; those of multiple choice have a dimension more."""
    shape = (num, choices, SEQ_LEN) if head_of(config) == "ForMultipleChoice" else (num, SEQ_LEN)
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB_SIZE, shape, generator=draw)  # 0 pads
    inputs = {"input_ids": tokens}
    if config.model_type == "bert":
        inputs["token_type_ids"] = torch.randint(2, shape, generator=draw)
    return inputs


@torch.no_grad()
def random_tuning(architecture: Architecture, is_rotated: bool, seed: int) -> Tuning:
    """Maps near the identity, shared by layers or each with its own, and factors far from one."""
    draw = torch.Generator().manual_seed(seed)
    with patch("llm_vtrans.masking.tuning.MAP_NUMBERS", MAP_NUMBERS if seed % 2 else 0):
        tuning = Tuning(architecture, is_rotated)
    for matrix in tuning.maps.values():
        matrix += 0.1 * torch.randn(matrix.shape, generator=draw)
    for factor in tuning.scales.values():
        factor.copy_(0.5 + torch.rand(factor.shape, generator=draw))
    if tuning.shift is not None:
        tuning.shift.copy_(torch.randn(tuning.shift.shape, generator=draw))
    return tuning


@torch.no_grad()
def check_exact(
    folder: Path,
    out: Path,
    is_uniform: bool,
    is_rotated: bool,
    seed: int,
    prunes_hidden: bool,
    is_apart: bool = False,
) -> None:
    source = open_source(str(folder))
    architecture, rotation, basis = source.architecture, None, None
    is_rotated = is_rotated and architecture.rotates
    inputs = inputs_for(source.config, seed)
    dense = logits_of(load_model(source, torch.float32, torch.device("cpu"))(**inputs))
    if is_apart and is_rotated and architecture.norm is Norm.RMS:
        architecture = rotated_architecture(architecture)
    model = load_model(source, torch.float32, torch.device("cpu"), architecture)
    if is_rotated:
        size = architecture.num_units[Axis.HIDDEN]
        rotation = random_rotation(size, seed, architecture.norm)
        rotate_model(model, architecture, rotation)
    is_tied = rotation is not None and architecture.tied_head is not None
    plain = logits_of(model(**inputs))
    if rotation is not None and not is_tied:
        assert relative(plain, dense) < TOLERANCE
    if architecture.couples_heads and is_uniform:
        basis = balanced_basis(model, architecture, [inputs], lambda batch: model(**batch))
    plan = random_plan(architecture, is_uniform, seed, prunes_hidden, basis)
    tuning = random_tuning(architecture, rotation is not None, seed)
    if rotation is not None and is_tied:
        tuning.tie(final_norm(source.checkpoint, architecture, rotation))
    masked = MaskedModel(model, architecture, tuning)
    if is_tied:
        assert relative(masked(inputs), dense) < TOLERANCE
    else:
        assert masked(inputs).equal(plain)  # without gates neither they nor the tuning act
    tuning.is_on = True
    assert relative(masked(inputs), dense) < TOLERANCE  # nor after tuning: it is the teacher
    masked.set_gates(plan.hard())
    expected = masked(inputs)
    pruning = Pruning(
        source.checkpoint, architecture, plan, tuning.basis(rotation), scales=tuning.factors()
    )
    export_model(pruning, source.family, source.config, is_uniform, out, 10**9)
    # Eager attention: the FLOP counter does not see the fused CPU kernel.
    exported, found = source.auto_class.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    assert relative(logits_of(exported.eval()(**inputs)), expected) < TOLERANCE
    assert exported.num_parameters() == parameter_cost(architecture).of(plan.shape)
    with FlopCounterMode(display=False) as counter:
        exported(**inputs_for(source.config, seed, num=1, choices=1))
    assert counter.get_total_flops() == 2 * mac_cost(architecture, SEQ_LEN).of(plan.shape)
    if is_uniform:
        assert type(exported).__module__.startswith("transformers.models.")


def random_rotation(size: int, seed: int, norm: Norm) -> torch.Tensor:
    """Orthogonal; where norms subtract the mean, it leaves every mean as it is."""
    num = size - 1 if norm is Norm.LAYER else size
    noise = torch.randn(num, num, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(noise)[0]
    if num == size:
        return rotation
    mirror = level(size).float()
    return mirror @ torch.block_diag(rotation, torch.ones(1, 1)) @ mirror


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("prunes_hidden", [True, False])
@given(seed=st.integers(0, 2**32 - 1), is_rotated=st.booleans())
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
def test_export_equals_masked_model(
    source_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    is_rotated: bool,
    is_uniform: bool,
    prunes_hidden: bool,
) -> None:
    config = open_source(str(source_folder)).config
    if is_uniform and getattr(config, "mlp_bias", False):
        pytest.skip("a llama with biases has no stock layout for every width")
    out = tmp_path_factory.mktemp("out")
    check_exact(source_folder, out, is_uniform, is_rotated, seed, prunes_hidden)


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("is_apart", [True, False])
@pytest.mark.parametrize("name", ["llama-tied", "gemma"])
def test_a_rotated_head_stays_tied_or_comes_apart(
    tmp_path: Path, name: str, is_apart: bool, is_uniform: bool
) -> None:
    folder, out = save_tiny(name, tmp_path / "dense"), tmp_path / "out"
    out.mkdir()
    check_exact(folder, out, is_uniform, True, 1, True, is_apart)


@pytest.mark.parametrize("prunes_hidden", [True, False])
@pytest.mark.parametrize("is_uniform", [True, False])
def test_layer_norms_are_rotated(tmp_path: Path, is_uniform: bool, prunes_hidden: bool) -> None:
    folder, out = save_tiny("gpt2", tmp_path / "dense"), tmp_path / "out"
    out.mkdir()
    check_exact(folder, out, is_uniform, True, 1, prunes_hidden)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("is_uniform", [True, False])
def test_generate_with_caches(
    tmp_path: Path, source_folder: Path, cache: str, is_uniform: bool
) -> None:
    source = open_source(str(source_folder))
    if source.auto_class is not AutoModelForCausalLM:
        pytest.skip("only language models generate")
    if is_uniform and getattr(source.config, "mlp_bias", False):
        pytest.skip("a llama with biases has no stock layout for every width")
    plan = random_plan(source.architecture, is_uniform, 3, not source.architecture.couples_heads)
    pruning = Pruning(source.checkpoint, source.architecture, plan)
    export_model(pruning, source.family, source.config, is_uniform, tmp_path, 10**9)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = torch.tensor([[5, 9, 20, 3]])
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(prompt, cache_implementation=cache, **greedy)
    plain = model.generate(prompt, use_cache=False, **greedy)
    assert cached.tolist() == plain.tolist()


def export_without_sublayers(source: Source, folder: Path) -> None:
    """In the per-layer layout, without the first attention and the second FFN."""
    plan = random_plan(source.architecture, False, 0)
    for name, layer in (("heads", 0), ("ffn", 1)):
        plan.keep[name][:] = True
        plan.keep[name][layer] = False
    folder.mkdir()
    pruning = Pruning(source.checkpoint, source.architecture, plan)
    export_model(pruning, source.family, source.config, False, folder, 10**9)


@torch.no_grad()
def test_a_per_layer_result_is_loaded_and_saved(tmp_path: Path, source_folder: Path) -> None:
    """As after further training: without warnings, and with all that loading it anew takes."""
    source = open_source(str(source_folder))
    inputs = inputs_for(source.config, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_without_sublayers(source, tmp_path / "run")
        model = source.auto_class.from_pretrained(tmp_path / "run").eval()
    model.save_pretrained(tmp_path / "saved")
    again, found = source.auto_class.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(found.values()), found
    assert logits_of(again.eval()(**inputs)).equal(logits_of(model(**inputs)))
    code = f"{PER_LAYER_MODULE}.py"
    assert (tmp_path / "saved" / code).read_bytes() == (tmp_path / "run" / code).read_bytes()


LOAD_ELSEWHERE = """
import sys, torch, transformers
folder, auto_class, found = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
assert "llm_vtrans" not in sys.modules
with torch.no_grad():
    logits = model(input_ids=torch.tensor([[5, 9, 20, 3]])).logits
torch.save(logits, found)
model.save_pretrained(folder + "-again")
"""


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-classify"])
def test_a_per_layer_result_carries_its_code(tmp_path: Path, name: str) -> None:
    """A process that has no `llm_vtrans` loads it, what it saved, and what was saved from that."""
    source = open_source(str(save_tiny(name, tmp_path / "dense")))
    export_without_sublayers(source, tmp_path / "run")
    model = source.auto_class.from_pretrained(tmp_path / "run").eval()
    model.save_pretrained(tmp_path / "saved")
    expected = model(input_ids=torch.tensor([[5, 9, 20, 3]])).logits
    for folder in ("run", "saved", "saved-again"):
        subprocess.run(
            [sys.executable, "-c", LOAD_ELSEWHERE, str(tmp_path / folder),
             source.auto_class.__name__, str(tmp_path / "found.pt")],
            cwd=tmp_path, check=True, env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        )  # fmt: skip
        assert relative(torch.load(tmp_path / "found.pt"), expected) < 1e-6


def test_config_names_the_written_dtype(tmp_path: Path) -> None:
    """A dense config may say float32 over bfloat16 shards: what is written counts."""
    folder = save_tiny("llama", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.config.dtype = "float32"
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    source = open_source(str(folder))
    pruning = Pruning(
        source.checkpoint, source.architecture, random_plan(source.architecture, True, 0)
    )
    config = export_config(pruning, source.family, source.config, True)
    assert source.config.to_dict()["dtype"] in ("float32", torch.float32)
    assert config["dtype"] == "bfloat16"
