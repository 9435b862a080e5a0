#!/usr/bin/env bash
# Every check of the repository; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Bytecode is written on first import: without it each of many processes compiles torch anew.
unset PYTHONDONTWRITEBYTECODE
bash launch/setup.sh
{ .venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy llm_vtrans eval; } &
checks=$!  # while the rest is installed, which needs the other core little
.venv/bin/pip install --quiet --disable-pip-version-check --constraint launch/constraints.txt \
    --editable ".[bitsandbytes,deepspeed,dev,tensorboard]" ||
    echo "tests: no bitsandbytes, DeepSpeed or TensorBoard here, their tests will be skipped" >&2
bash tests/slurm/setup.sh || echo "tests: no SLURM here, its tests will be skipped" >&2
wait "$checks"
# One thread for each of two workers: the tests are many small processes. Files keep their order:
# the long ones are not left for the end.
OMP_NUM_THREADS=1 .venv/bin/pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
