"""`prune` as rank zero runs it here, and the other ranks on a processor of another kind.

Eigenvectors have no sign of their own: which one a library gives depends on how it rounds.
"""

import os
import runpy
from pathlib import Path
from typing import Any

import torch

PRUNE = Path(__file__).parents[1] / "llm_vtrans" / "prune.py"
EIGH = torch.linalg.eigh


def other_eigh(matrix: torch.Tensor) -> tuple[Any, Any]:
    """The same eigenvectors, every second one turned round."""
    values, vectors = EIGH(matrix)
    signs = torch.ones_like(values)
    signs[..., ::2] = -1
    return values, vectors * signs[..., None, :]


if __name__ == "__main__":
    if os.environ["RANK"] != "0":
        torch.linalg.eigh = other_eigh
    runpy.run_path(str(PRUNE), run_name="__main__")
