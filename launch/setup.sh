#!/usr/bin/env bash
# Install the package and its development tools into .venv at the repository root.
#
# PYTHON names the interpreter (default: python3). While pyproject.toml, the constraints
# and the interpreter stay the same, a later run does nothing. A .venv that was made by
# another interpreter, elsewhere or not by this script is replaced.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
fail() {
    echo "setup: $1; install Python 3.11 or later, or name it: PYTHON=python3.12 $0" >&2
    exit 2
}
command -v "$python" >/dev/null || fail "there is no $python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version 2>&1) is too old"

interpreter="$("$python" -VV) for $PWD"
stamp=$("$python" - "$interpreter" pyproject.toml launch/constraints.txt <<'PY'
import hashlib, pathlib, sys

digest = hashlib.sha256(sys.argv[1].encode())
for name in sys.argv[2:]:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
)
holds() { [[ -f $1 && $(<"$1") == "$2" ]]; }
holds .venv/installed "$stamp" && exit

# The two files are written last, so an interrupted run is taken up where it was.
if ! holds .venv/interpreter "$interpreter"; then
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
    echo "$interpreter" >.venv/interpreter
fi
echo "setup: installing (minutes the first time)"
rm -f .venv/installed
# Bytecode is compiled on first import: of torch's thousands of modules few are needed.
.venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
    --constraint launch/constraints.txt --editable ".[dev]"
echo "$stamp" >.venv/installed
