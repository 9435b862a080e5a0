import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    "CHANGELOG",
    "CITATION.cff",
    "LICENSE",
    "README.md",
    "ds_configs",
    "eval",
    "launch",
    "llm_vtrans",
    "pyproject.toml",
    "tests",
}
DEPENDENCIES = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "evaluate",
    "huggingface_hub",
    "hypothesis",
    "lm_eval",
    "numpy",
    "peft",
    "pytest",
    "safetensors",
    "sklearn",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "yaml",
}
MACHINE_PATH = re.compile(
    r"(?<![\w.$}~*-])/(?:home|root|Users|work|mnt|media|scratch|srv|opt)/\w[^\s'\"`]*"
)


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """What is or would be committed, relative to the repository root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"needs a git checkout: {result.stderr.strip()}")
    names = [Path(name) for name in result.stdout.split("\0") if name]
    return [name for name in names if (ROOT / name).is_file()]


def test_no_module_hides_another() -> None:
    # `accelerate launch llm_vtrans/prune.py` puts llm_vtrans/ first on sys.path.
    names = {path.stem for path in (ROOT / "llm_vtrans").iterdir()}
    assert not names & (DEPENDENCIES | sys.stdlib_module_names)


def test_top_level(files: list[Path]) -> None:
    entries = {path.parts[0] for path in files}
    assert {name for name in entries if not name.startswith(".")} <= TOP_LEVEL


def test_no_path_of_a_machine(files: list[Path]) -> None:
    found = []
    for path in files:
        try:
            text = (ROOT / path).read_text()
        except UnicodeDecodeError:
            continue  # weights
        found += [f"{path}: {match}" for match in MACHINE_PATH.findall(text)]
    assert not found


def test_the_pattern_of_paths() -> None:
    for user in ("home", "Users", "root"):
        assert MACHINE_PATH.search(f'open("/{user}/me/model")')
    for harmless in ("#!/usr/bin/env bash", "num/home/s", "../home/x", "$HOME/home/x"):
        assert not MACHINE_PATH.search(harmless)
