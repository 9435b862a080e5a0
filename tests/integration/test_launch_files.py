"""Every launch file and DeepSpeed configuration is one that the libraries take."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.runs import ROOT

LAUNCH = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))
SCRIPTS = sorted((ROOT / "launch").glob("slurm/*"))


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_accelerate_takes_it(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    text = yaml.safe_load(path.read_text())
    if text["distributed_type"] == "DEEPSPEED":
        # accelerate refuses mixed_precision beside a DeepSpeed file, and ours needs none.
        assert "mixed_precision" not in text
        assert (ROOT / text["deepspeed_config"]["deepspeed_config_file"]).is_file()


@pytest.mark.deepspeed
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed library"
)
@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.name)
def test_deepspeed_takes_it(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = json.loads(path.read_text())["zero_optimization"]
    config = DeepSpeedZeroConfig(**settings)
    assert path.stem.startswith(f"zero{int(config.stage)}")
    offload = config.offload_param
    # An enumeration or its value, as DeepSpeed's release has it.
    device = None if offload is None else getattr(offload.device, "value", offload.device)
    assert device == {"zero3_offload_cpu": "cpu", "zero3_offload_nvme": "nvme"}.get(path.stem)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_parses_it(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
