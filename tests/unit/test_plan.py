"""`llm-vtrans plan`: counts, what it asks of the config alone, the choice it makes."""

from pathlib import Path

import pytest
import torch

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.commands.command import USER_ERROR, run_command
from llm_vtrans.commands.plan import launches, plan
from llm_vtrans.families import family_for
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.preparation.resources import Workload, activation_bytes_per_token, weight_bytes
from llm_vtrans.training.search import complete_layers, initial_shapes
from tests.tiny import CONFIGS, VOCAB_SIZE, save_tiny, tiny_model

STRUCTURES = ("hidden", "heads", "ffn", "layers")


def test_reads_the_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    plan(["--model", str(tmp_path), "--gpus", "4", "--seq-len", "32"])
    output = capsys.readouterr().out
    num_params = sum(p.numel() for p in tiny_model("llama").parameters())
    assert f"parameters {num_params:,} -> at most {num_params // 2:,}" in output
    assert "use: accelerate launch --config_file launch/accelerate/multi_gpu.yaml" in output
    for file in ("multi_gpu.yaml", "zero3.yaml", "zero3_offload.yaml"):
        assert (Path("launch/accelerate") / file).is_file()
        assert file in output


def test_defaults_are_those_of_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path), "--gpus", "4", "--seq-len", "32", "--peak", "1M"]
    plan(flags)
    told = capsys.readouterr().out
    prune = PruneArguments().filled(32, num_ranks=4)
    assert f"--batch-size {prune.batch_size} " in told
    given = ["--batch-size", str(prune.batch_size), "--samples", str(prune.num_samples())]
    plan([*flags, *given])

    def rows(output: str) -> list[str]:  # with the seconds of every launch
        return [line for line in output.splitlines() if ".yaml" in line]

    assert rows(capsys.readouterr().out) == rows(told)


def test_no_seconds_of_a_processor_that_nobody_names(capsys: pytest.CaptureFixture[str]) -> None:
    """What one reaches differs by a factor of a hundred; that of a GPU says nothing of it."""
    plan([])
    assert "operations/s" not in capsys.readouterr().out
    plan(["--peak", "0.1T"])
    assert "40% of 0.1T operations/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "-1"], "--gpus must not be negative"),
        (["--gpus", "1", "--gpu-memory", "many"], "--gpu-memory 'many'"),
        (["--mfu", "1.5"], "--mfu must be in (0, 1)"),
        (["--peak", "0T"], "--peak '0T': must be above 0"),
        (["--seq-len", "-5"], "--seq-len must be at least 2, got -5"),
        (["--model", "./nothing"], "its config cannot be read"),
        (["--seq-len", "100000"], "--seq-len 100000 is longer than the model's context of 256"),
    ],
)
def test_mistakes_are_told(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(plan, flags) == USER_ERROR
    assert said in capsys.readouterr().err


def test_less_memory_asks_for_another_launch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("llama", tmp_path)
    plan(["--model", str(tmp_path), "--gpus", "2", "--gpu-memory", "0.1GB"])
    assert "none fits" in capsys.readouterr().out


def test_slices_of_weights() -> None:
    architecture = family_for("llama").describe(CONFIGS["llama"])
    whole = Workload(1, 16)
    found = {launch.file for launch in launches(whole, 2)}
    assert found == {"multi_gpu.yaml", "zero3.yaml", "zero3_offload.yaml"}
    sliced = Workload(1, 16, num_ranks=2, is_sliced=True)
    assert weight_bytes(architecture, sliced) == weight_bytes(architecture, whole) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama-mha", "mistral"])
def test_kept_activations_are_counted(name: str, dtype: torch.dtype) -> None:
    """Against what autograd really saves, one layer more or less."""
    bytes_of = []
    for num_layers in (2, 5):
        config = type(CONFIGS[name])(**CONFIGS[name].to_dict())
        config.num_hidden_layers = num_layers
        model = tiny_model(name, config=config).to(dtype)
        architecture = family_for(config.model_type).describe(config)
        masked = MaskedModel(model, architecture)
        masks = VIBMasks(initial_shapes(architecture, STRUCTURES, True), -4.0, 0)
        gates = masks.sample(torch.Generator().manual_seed(0))
        masked.set_gates(complete_layers(gates, architecture))
        fixed = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(x: torch.Tensor, kept=kept, fixed=fixed) -> torch.Tensor:  # type: ignore[no-untyped-def]
            storage = x.untyped_storage()
            if storage.data_ptr() not in fixed:
                kept[storage.data_ptr()] = storage
            return x

        num_tokens = 2 * 64
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = masked.hidden_states(torch.randint(VOCAB_SIZE, (2, 64)))
        bytes_of.append(sum(storage.nbytes() for storage in kept.values()) / num_tokens)
        assert output.requires_grad
        work = Workload(2, 64, dtype_bytes=dtype.itemsize)
        expected = activation_bytes_per_token(architecture, work) / num_layers
    assert (bytes_of[1] - bytes_of[0]) / 3 == pytest.approx(expected, rel=0.1)
