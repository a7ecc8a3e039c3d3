#!/usr/bin/env bash
# What one host of a cluster does, in a copy of this checkout: launch/host.sh install EXTRA | run train OPTION... | status | stop
#
#     install EXTRA   mounts SHARED on /shared, and installs jaxreason[EXTRA] (tpu, cuda) into VENV
#     run             starts 'jaxreason train OPTION...' on a TPU host, which goes on when the connection ends
#     status          says in a line whether it runs, or how it ended
#     stop            asks it to save and end (SIGTERM), and waits until it has
#
# SHARED  HOST:/PATH of an NFS server, for instance Filestore; without it whatever is at /shared is used
# VENV    the virtual environment (default ~/jaxreason-venv); it outlives a new copy of the checkout
# STATE   the folder of the log, the process's number and its exit code (default ~/jaxreason-run)
set -eu

cd "$(dirname "$0")/.."
venv=${VENV:-$HOME/jaxreason-venv}
state=${STATE:-$HOME/jaxreason-run}

fail() {
    printf 'host.sh on %s: %s\n' "$HOSTNAME" "$*" >&2
    exit 2
}

mount_shared() {
    [[ -n ${SHARED:-} ]] || return 0
    [[ $SHARED =~ ^[^:/]+:/[^/] ]] || fail "SHARED is '$SHARED': expected HOST:/PATH of an NFS server"
    if ! mountpoint -q /shared; then
        command -v mount.nfs >/dev/null || { sudo apt-get -q update && sudo apt-get -q install -y nfs-common; } >/dev/null
        sudo mkdir -p /shared
        sudo mount -t nfs "$SHARED" /shared
    fi
    sudo install -d -m 1777 /shared/runs
}

# The images of TPU hosts come with Python 3.10.
find_python() {
    local candidate
    for candidate in python3.12 python3.13 python3.11 python3; do
        "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$candidate" && return
    done
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh >&2
    uv python install --quiet 3.12 >&2
    uv python find 3.12
}

runs() {
    [[ -s $state/pid ]] && kill -0 "$(<"$state/pid")" 2>/dev/null
}

say_status() {
    if runs; then
        printf '%s: runs as process %s\n' "$HOSTNAME" "$(<"$state/pid")"
    elif [[ -s $state/code ]]; then
        printf '%s: ended with code %s\n' "$HOSTNAME" "$(<"$state/code")"
    elif [[ -s $state/pid ]]; then
        printf '%s: ended without a code: the host was shut down, or memory ran out\n' "$HOSTNAME"
    else
        printf '%s: was not started\n' "$HOSTNAME"
    fi
}

what=${1:-}
[[ $# -eq 0 ]] || shift
case $what in
install)
    [[ ${1:-} == tpu || ${1:-} == cuda ]] || fail "the extra is '${1:-}': expected tpu or cuda"
    mount_shared
    PYTHON=$(find_python) launch/bootstrap.sh "$venv" "$1"
    ;;
run)
    ! runs || fail "a run is under way as process $(<"$state/pid"): stop it first"
    [[ -x $venv/bin/jaxreason ]] || fail "there is no $venv/bin/jaxreason: install first"
    mkdir -p "$state"
    rm -f "$state/pid" "$state/code"
    nohup setsid "launch/$(basename "$0")" hold "$@" >>"$state/log" 2>&1 </dev/null &
    for _ in {1..100}; do
        [[ ! -s $state/pid ]] || break
        sleep 0.1
    done
    say_status
    ;;
hold) # what 'run' leaves behind: it waits for the program and writes its code down
    # shellcheck source=launch/tpu.env
    . launch/tpu.env
    umask 000 # hosts may number the same user differently, and all of them write into the run's folder
    "$venv/bin/jaxreason" "$@" &
    printf '%s\n' "$!" >"$state/pid"
    code=0
    wait "$!" || code=$?
    printf '%s\n' "$code" >"$state/code"
    ;;
status)
    say_status
    ;;
stop)
    if runs; then
        kill -TERM "$(<"$state/pid")" # once: a second one would end it before it has saved
        while runs || [[ ! -s $state/code ]]; do
            sleep 0.2
        done
    fi
    say_status
    ;;
*)
    fail "the command is '$what': expected install, run, status or stop"
    ;;
esac
