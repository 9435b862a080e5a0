"""Structured pruning of transformers by variational-information-bottleneck masks.

Importing the package makes checkpoints in the per-layer layout loadable by
`AutoModelForCausalLM` without `trust_remote_code`.
"""

import os
import signal
import sys
from pathlib import PurePath

PROGRAMS = ("llm-vtrans", "prune.py", "score.py")

if (
    PurePath((sys.argv or [""])[0]).name in PROGRAMS
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    # Importing torch takes seconds. Ctrl-C then ends the program and tells no traceback; from
    # `run_command` on it is an exception again.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Of a rank that has gone torch.distributed tells by backtraces in C++, then raises an exception
# that says the same.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

from llm_vtrans.export import per_layer_modeling as per_layer_modeling  # noqa: E402

__version__ = "0.1.0"
