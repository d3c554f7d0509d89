#!/usr/bin/env bash
# `make test-vllm`: the tests that need real vLLM engines and real load generators; installs both outside the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
TWOFOLD_VLLM_VENV=$(scripts/install_vllm.sh)
TWOFOLD_CLIENTS_VENV=$(scripts/install_clients.sh)
export TWOFOLD_VLLM_VENV TWOFOLD_CLIENTS_VENV
exec .venv/bin/python -m pytest tests/vllm --timeout 900 "$@"
