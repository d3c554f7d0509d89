#!/usr/bin/env bash
# Installs the load generators of requirements/clients.lock (aiperf) into a cached venv. usage: install_clients.sh [DIR]
#
# The last line of standard output is the venv's folder; DIR/bin/aiperf is the command. More than 1 GB the first time,
# nothing after that.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/cached_venv.sh

install_clients() {
    say "aiperf and dependencies"
    venv_pip install -r requirements/clients.lock
}

cached_venv clients requirements/clients.lock "${1:-}" install_clients "import aiperf"
