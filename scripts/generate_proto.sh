#!/usr/bin/env bash
# Generates twofold/v1 from proto/. usage: generate_proto.sh [OUT_DIR]   (default: the repository root)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out/twofold/v1"
PATH="$(dirname "$(realpath -s "$python")"):$PATH" "$python" -m grpc_tools.protoc -I proto \
    --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
    proto/twofold/v1/*.proto
