#!/usr/bin/env bash
# `make test-vllm`: the tests that need real vLLM engines and real load generators; installs both outside the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
said=$(mktemp)
trap 'rm -f "$said"' EXIT
scripts/install_clients.sh >"$said" &
clients_pid=$!
TWOFOLD_VLLM_VENV=$(scripts/install_vllm.sh)
wait "$clients_pid"
TWOFOLD_CLIENTS_VENV=$(tail -n 1 "$said")
export TWOFOLD_VLLM_VENV TWOFOLD_CLIENTS_VENV
.venv/bin/python -m pytest tests/vllm --timeout 900 "$@"
