#!/usr/bin/env bash
# Pins the dependencies of pyproject.toml with hashes in requirements/dev.lock (no registry is named in it).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
mkdir -p requirements
"$python" -m piptools compile --quiet --extra dev --extra redis --extra kubernetes --extra plot --generate-hashes --allow-unsafe \
    --strip-extras --resolver=backtracking --no-header --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options --no-annotate \
    --output-file requirements/dev.lock pyproject.toml "$@"
