# Sourced by the installers of multi-gigabyte tools: a venv in a cache outside the checkout, built once.
#
#   cached_venv NAME LOCK DIR INSTALL CHECK
#
# NAME     names the tool in messages and in the cache folder.
# LOCK     file of pinned versions; its hash, with the Python version, identifies an install.
# DIR      where to build; empty means $TWOFOLD_CACHE (default ${XDG_CACHE_HOME:-~/.cache}/twofold)/NAME-<hash>.
# INSTALL  function called with the venv's folder; fills it.
# CHECK    Python statement that must succeed in the filled venv.
#
# A finished install carries a marker file with its hash and is left as it is; one that was interrupted, belongs to
# another lock, or lost its interpreter is built anew. A second installer of the same folder waits for the first.
# Environment: PYTHON (default python3) makes the venv. Progress goes to standard error; the last line of standard
# output is the venv's folder. Exit status: 0 ready, 1 failed (pip's log stays beside the folder), 2 wrong use.

say() { printf '[%4ds] %s\n' "$SECONDS" "$*" >&2; }

# pip of the venv being filled; what it prints goes to the log, its errors to standard error as well.
venv_pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@" --progress-bar off >>"$log" 2>&1 && return 0
    grep '^ERROR' "$log" >&2
    return 1
}

cached_venv() {
    local name=$1 lock=$2 dir=$3 install=$4 check=$5
    local python=${PYTHON:-python3} version key
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || return 2
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        say "$name: Python 3.11 or newer is needed, $python is $version; set PYTHON"
        return 2
    fi
    key=$({ cat "$lock"; echo "python $version"; } | sha256sum | cut -c1-12)
    if [ -z "$dir" ]; then
        dir=${TWOFOLD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/twofold}/$name-$key
    fi
    mkdir -p "$dir" || return 1
    dir=$(cd "$dir" && pwd -P)
    venv=$dir log=$dir.log

    exec 9>"$dir.lock"
    if ! flock -n 9; then
        say "$name: another installer is at work in $dir, waiting for it"
        flock 9
    fi
    if [ "$(cat "$dir/.twofold-installed" 2>/dev/null)" = "$key" ] && "$dir/bin/python" -c pass 2>/dev/null; then
        say "$name: installed in $dir"
        exec 9>&-
        echo "$dir"
        return 0
    fi
    if [ -n "$(ls -A "$dir")" ] && [ ! -f "$dir/.twofold-venv" ]; then
        say "$name: $dir is not empty and was not made by this script; name another folder"
        return 2
    fi
    find "$dir" -mindepth 1 -delete
    touch "$dir/.twofold-venv"
    : >"$log"
    say "$name: installing into $dir (Python $version)"
    if ! "$python" -m venv "$dir" || ! "$install" "$dir" || ! "$dir/bin/python" -c "$check" >>"$log" 2>&1; then
        say "$name: failed; see $log"
        return 1
    fi
    echo "$key" >"$dir/.twofold-installed"
    say "$name: done, $(du -sh "$dir" | cut -f1)"
    exec 9>&-
    echo "$dir"
}
