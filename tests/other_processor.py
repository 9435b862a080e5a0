"""`prune` as rank zero runs it here, and the other ranks on a processor of another kind.

Eigenvectors have no sign of their own: which one a library gives depends on how it rounds.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
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
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / "llm_vtrans" / "prune.py"), run_name="__main__")
