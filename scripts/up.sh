#!/usr/bin/env bash
# `make up`: keep a fleet running. usage: up.sh [fleet.yaml]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${ENGINE:-emulated}" = vllm ]; then
    venv=$(scripts/install_vllm.sh)
    exec .venv/bin/twofold up --engine vllm --vllm-python "$venv/bin/python" --vllm-model "$PWD/tests/assets/tiny-model" "$@"
fi
exec .venv/bin/twofold up "$@"
