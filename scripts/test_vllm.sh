#!/usr/bin/env bash
# `make test-vllm`: the tests that need real vLLM engines and real load generators; installs both outside the checkout.
# `make test-vllm-operations` (VLLM_OPERATIONS=1): those that start an engine of their own for each set of flags.
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
own_engines=(tests/vllm/test_operations.py tests/vllm/test_kv_events.py)
if [ -n "${VLLM_OPERATIONS:-}" ]; then
    .venv/bin/python -m pytest "${own_engines[@]}" --timeout 900 "$@"
else
    .venv/bin/python -m pytest tests/vllm "${own_engines[@]/#/--ignore=}" --timeout 900 "$@"
fi
