#!/usr/bin/env bash
# Builds the wheel, unpacks it outside the checkout's packages and runs the test suite against it.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$bin/python" -m build --wheel --no-isolation --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
"$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/site" "$work"/dist/*.whl
cp -r tests proto scripts pyproject.toml "$work/"
cd "$work"
export PYTHONPATH=$work/site TWOFOLD_EXPECT_PACKAGES_UNDER=$work/site
# shellcheck disable=SC2086  # flags, split on purpose
"$bin/python" -m pytest tests/unit tests/contract tests/integration ${PARALLEL:-} "$@"
