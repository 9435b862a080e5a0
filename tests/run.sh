#!/usr/bin/env bash
# Every check of the repository; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy llm_vtrans eval
.venv/bin/pytest -q "$@"
