"""`prune` with DeepSpeed on gloo: the collectives of its own take minutes to compile."""

import runpy
import sys
from pathlib import Path

import deepspeed

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / "llm_vtrans" / "prune.py"), run_name="__main__")
