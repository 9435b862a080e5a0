"""`prune` with DeepSpeed on gloo: the collectives of its own take minutes to compile."""

import runpy
from pathlib import Path

import deepspeed

PRUNE = Path(__file__).parents[1] / "llm_vtrans" / "prune.py"

if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    runpy.run_path(str(PRUNE), run_name="__main__")
