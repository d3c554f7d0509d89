#!/usr/bin/env bash
# Installs one router that the data-plane benchmark measures beside Twofold, outside the checkout, once.
#
#   install_peer.sh PEER [DIR]      PEER: nginx, vllm-router or sglang-router
#
# The last line of standard output is the command to run. vllm-router and sglang-router get a venv each (about 200 MB),
# pinned by requirements/peers.lock; an nginx on PATH is used as it is, else Debian's package is unpacked (no root needed).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/cached_venv.sh

install_python_peer() {
    venv_pip install -c requirements/peers.lock "$peer"
}

# An nginx that can run from DIR: Debian's binary needs only libraries that every Debian has.
unpack_nginx() {
    local dir=$1
    mkdir -p "$dir"
    exec 9>"$dir.lock"
    flock 9
    if ! "$dir/usr/sbin/nginx" -v 2>/dev/null; then
        say "nginx: unpacking Debian's package into $dir"
        (cd "$dir" && apt-get -o APT::Sandbox::User=root -qq download nginx && dpkg-deb -x nginx_*.deb . && rm -f nginx_*.deb) \
            >"$dir.log" 2>&1 || { say "nginx: no package to be had; see $dir.log"; return 1; }
        "$dir/usr/sbin/nginx" -v 2>>"$dir.log" || { say "nginx: does not run here; see $dir.log"; return 1; }
    fi
    echo "$dir/usr/sbin/nginx"
}

peer=${1:-}
case $peer in
nginx)
    command -v nginx || unpack_nginx "${2:-${TWOFOLD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/twofold}/nginx}"
    ;;
vllm-router | sglang-router)
    module=${peer//-/_}
    dir=$(cached_venv "$peer" requirements/peers.lock "${2:-}" install_python_peer "import $module.router_args" | tail -n 1)
    echo "$dir/bin/$peer"
    ;;
*)
    say "usage: install_peer.sh nginx|vllm-router|sglang-router [DIR]"
    exit 2
    ;;
esac
