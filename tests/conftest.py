"""Settings and fixtures for all tests: no network, and the shared data beside the checkout."""

import os
from pathlib import Path

# Before any import: the libraries read these when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Idle threads that spin starve each other where cores are few.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of small models and data sets beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder shared/ (models and data) beside the repository")
    return folder
