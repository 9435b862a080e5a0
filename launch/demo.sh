#!/usr/bin/env bash
# Prune the embedded model from start to end, on a GPU where there is one, else on the CPU.
# Further arguments go to prune.py; the result lies in runs/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
# Explicit values keep accelerate from asking for a config file or warning about its absence.
# --quiet: our one-line errors are not followed by a traceback of the launcher.
flags=(--quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)
threads=$(.venv/bin/python -c 'import torch
print(0 if torch.cuda.is_available() else torch.get_num_threads())')
if ((threads)); then
    flags+=(--cpu --num_cpu_threads_per_process "$threads")
fi
exec .venv/bin/accelerate launch "${flags[@]}" llm_vtrans/prune.py \
    --output runs/demo --overwrite --samples 2400 "$@"
