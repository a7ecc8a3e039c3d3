#!/usr/bin/env bash
# A run on a Cloud TPU slice by gcloud: launch/tpu_pod.sh COMMAND
#
#     create               asks for the slice, and waits until its hosts answer
#     sync                 copies this checkout to every host: what git tracks, and new files that it does not ignore
#     install              installs it there, and mounts SHARED on /shared
#     run train OPTION...  starts the run on every host, each with the same command and --distributed
#     tail                 follows the log of process 0's host
#     status               the slice's state, and a line from each host
#     stop                 saves and ends the run on every host (exit code 75)
#     resume train ...     after preemption: deletes what is left of the slice, then create, sync, install and run
#     delete               deletes the slice; asks first
#
# TPU_NAME  the slice's name
# ZONE      for example us-west4-a
# TPU_TYPE  for create and resume: for example v5litepod-64, v5p-128, v6e-16
# SHARED    for install and resume: HOST:/PATH of an NFS server that all hosts reach, for instance Filestore; it holds the run's folder
# PROJECT   without it gcloud's own setting
# CAPACITY  on-demand (default), spot or reserved
# QUEUED    1: ask through a queued resource of the same name, which waits until there is room
# RUNTIME   the hosts' image; without it the one for TPU_TYPE
# DRY_RUN   1: print the commands instead of running them
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)

fail() {
    printf 'tpu_pod.sh: %s\n' "$*" >&2
    exit 2
}

call() {
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

tpus() { # GROUP VERB WORD...: gcloud on things in our zone
    call gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

quoted() { # WORD...: as one line for the hosts' shell
    local line
    printf -v line ' %q' "$@"
    printf '%s' "${line:1}"
}

on_hosts() { # WORD...: runs launch/host.sh with these words on every host
    tpus tpu-vm ssh "$TPU_NAME" --worker=all --command="$(quoted env "SHARED=${SHARED:-}" jaxreason/launch/host.sh "$@")"
}

check_type() {
    case ${TPU_TYPE:-} in
    v4-*[0-9]) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*[0-9]) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*[0-9]) runtime=v2-alpha-tpuv5 ;;
    v6e-*[0-9]) runtime=v2-alpha-tpuv6e ;;
    *)
        [[ ${TPU_TYPE:-} =~ ^v[0-9a-z]+-[0-9]+$ ]] ||
            fail "TPU_TYPE is '${TPU_TYPE:-}': expected a type and a size, for example TPU_TYPE=v5litepod-64"
        [[ -n ${RUNTIME:-} ]] || fail "TPU_TYPE is '$TPU_TYPE', whose image is not known here: name it in RUNTIME"
        ;;
    esac
    runtime=${RUNTIME:-$runtime}
    case ${CAPACITY:-on-demand} in
    on-demand) capacity=() ;;
    spot) capacity=(--spot) ;;
    reserved) capacity=(--reserved) ;;
    *) fail "CAPACITY is '$CAPACITY': expected on-demand, spot or reserved" ;;
    esac
}

check_shared() {
    [[ ${SHARED:-} =~ ^[^:/]+:/[^/] ]] ||
        fail "SHARED is '${SHARED:-}': expected HOST:/PATH of an NFS server, for example SHARED=10.0.0.2:/share, on which the run's folder outlives the slice"
}

check_run() {
    [[ ${1:-} == train ]] || fail "the command to run is '${1:-}': expected train and its options"
    local word
    for word in "$@"; do
        [[ $word != *gs://* ]] || fail "'$word' is a bucket: the hosts see SHARED at /shared, for example --workdir /shared/runs/mine"
        [[ $word != --distributed ]] || fail "--distributed is added by this script: leave it out"
    done
}

state() {
    local group=tpu-vm field=state
    [[ -z ${QUEUED:-} ]] || group=queued-resources field=state.state
    tpus "$group" describe "$TPU_NAME" --format="value($field)"
}

create() {
    if [[ -n ${QUEUED:-} ]]; then
        tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" --runtime-version="$runtime" \
            ${capacity[@]+"${capacity[@]}"}
    else
        tpus tpu-vm create "$TPU_NAME" --accelerator-type="$TPU_TYPE" --version="$runtime" ${capacity[@]+"${capacity[@]}"}
    fi
    local now
    while true; do
        now=$(state)
        case $now in
        READY | ACTIVE) break ;;
        FAILED | SUSPEND* | PREEMPTED | TERMINATED) fail "$TPU_NAME is $now: delete it, and ask again" ;;
        gcloud*) printf '%s\n' "$now" && break ;; # a dry run
        esac
        printf '%s is %s\n' "$TPU_NAME" "$now" >&2
        sleep 30
    done
    for _ in {1..20}; do # a new host answers after a while
        tpus tpu-vm ssh "$TPU_NAME" --worker=all --command=true && return
        sleep 15
    done
    fail "the hosts of $TPU_NAME do not answer: see above, and try 'sync' later"
}

sync() {
    git -C "$root" rev-parse --is-inside-work-tree >/dev/null 2>&1 || fail "$root is not a git checkout: sync copies one"
    local folder
    folder=$(mktemp -d)
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$folder'" EXIT
    (
        cd "$root"
        git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
            [[ ! -e $file ]] || printf '%s\0' "$file" # one that was deleted is still listed
        done | tar --null -T - -czf "$folder/jaxreason.tar.gz"
    )
    tpus tpu-vm scp "$folder/jaxreason.tar.gz" "$TPU_NAME:" --worker=all
    tpus tpu-vm ssh "$TPU_NAME" --worker=all \
        --command='rm -rf jaxreason && mkdir jaxreason && tar -xzf jaxreason.tar.gz -C jaxreason'
}

command=${1:-}
[[ $# -eq 0 ]] || shift
[[ ${TPU_NAME:-} =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    fail "TPU_NAME is '${TPU_NAME:-}': expected a name of small letters, digits and '-', for example TPU_NAME=mine"
[[ ${ZONE:-} =~ ^[a-z]+-[a-z0-9]+-[a-z]$ ]] || fail "ZONE is '${ZONE:-}': expected a zone, for example ZONE=us-west4-a"
[[ -n ${DRY_RUN:-} ]] || command -v gcloud >/dev/null || fail "there is no gcloud: install the Google Cloud CLI and log in"

case $command in
create)
    check_type
    create
    ;;
sync)
    sync
    ;;
install)
    check_shared
    on_hosts install tpu
    ;;
run)
    check_run "$@"
    on_hosts run "$@" --distributed
    ;;
tail)
    tpus tpu-vm ssh "$TPU_NAME" --worker="${WORKER:-0}" --command='tail -n 50 -F jaxreason-run/log'
    ;;
status)
    state
    on_hosts status
    ;;
stop)
    on_hosts stop
    ;;
resume)
    check_type
    check_shared
    check_run "$@"
    now=$(state) || now=gone
    case $now in
    READY | ACTIVE) fail "$TPU_NAME is $now, so it was not preempted: use 'run'" ;;
    gcloud*) printf '%s\n' "$now" ;; # a dry run
    esac
    if [[ $now != gone && -n ${QUEUED:-} ]]; then
        tpus queued-resources delete "$TPU_NAME" --force --quiet
    elif [[ $now != gone ]]; then
        tpus tpu-vm delete "$TPU_NAME" --quiet
    fi
    create
    sync
    on_hosts install tpu
    on_hosts run "$@" --distributed
    ;;
delete)
    if [[ -n ${QUEUED:-} ]]; then
        tpus queued-resources delete "$TPU_NAME" --force
    else
        tpus tpu-vm delete "$TPU_NAME"
    fi
    ;;
*)
    fail "the command is '$command': expected create, sync, install, run, tail, status, stop, resume or delete"
    ;;
esac
