"""`llm-vtrans score` as a script, for `accelerate launch eval/score.py` from a checkout."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout need not be installed

from llm_vtrans.commands.command import run_command
from llm_vtrans.score import run

if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
