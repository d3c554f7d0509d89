#!/usr/bin/env bash
# Creates the virtual environment with the pinned dependencies and the project in editable form.
# usage: setup.sh PYTHON VENV
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 venv=$2
"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit("error: Python >= 3.11 is needed, this is %s (set PYTHON=...)" % sys.version.split()[0])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("error: this Python has no venv module (Debian/Ubuntu: apt install python3-venv)")
PY
start=$SECONDS
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "installing pinned dependencies into $venv (a minute or two) ..." >&2
{
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.lock &&
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
} >"$venv/setup.log" 2>&1 || { cat "$venv/setup.log" >&2; exit 1; }
touch "$venv/.installed"
echo "ready in $((SECONDS - start)) s" >&2
