#!/usr/bin/env bash
# `make demo`: emulated engines by default; ENGINE=vllm installs vLLM CPU first and runs two real ones.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${ENGINE:-emulated}" = vllm ]; then
    venv=$(scripts/install_vllm.sh)
    exec .venv/bin/twofold demo --engine vllm --vllm-python "$venv/bin/python" --vllm-model "$PWD/tests/assets/tiny-model" "$@"
fi
exec .venv/bin/twofold demo "$@"
