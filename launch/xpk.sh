#!/usr/bin/env bash
# A run on a GKE cluster's TPU slices by xpk: launch/xpk.sh train --config F --workdir D [OPTION...]
#
# NAME      the workload's name
# CLUSTER   the cluster, with ZONE and PROJECT
# TPU_TYPE  for example v5litepod-64, v5p-128, v6e-16
# IMAGE     made from launch/Dockerfile.tpu, in a registry that the cluster reads
# STORAGE   a storage that 'xpk storage attach' has made known; it holds the run's folder, at its mount point
# RESTARTS  how often the run is started again by itself (default 20)
# DRY_RUN   1: print the command instead of running it
set -eu

fail() {
    printf 'xpk.sh: %s\n' "$*" >&2
    exit 2
}

interrupted=75 # the program's code for interrupted and saved
[[ ${1:-} == train ]] || fail "the command to run is '${1:-}': expected train and its options"
[[ ${NAME:-} =~ ^[a-z]([a-z0-9-]{0,37}[a-z0-9])?$ ]] || fail "NAME is '${NAME:-}': expected up to 39 small letters, digits and '-', for example NAME=mine"
[[ ${TPU_TYPE:-} =~ ^v[0-9a-z]+-[0-9]+$ ]] || fail "TPU_TYPE is '${TPU_TYPE:-}': expected a type and a size, for example TPU_TYPE=v5litepod-64"
[[ ${RESTARTS:-20} =~ ^[0-9]{1,4}$ ]] || fail "RESTARTS is '$RESTARTS': expected a whole number"
[[ -n ${CLUSTER:-} ]] || fail "CLUSTER is not set: expected the name of a cluster of 'xpk cluster list'"
[[ -n ${ZONE:-} ]] || fail "ZONE is not set: expected the cluster's zone, for example ZONE=us-west4-a"
[[ -n ${PROJECT:-} ]] || fail "PROJECT is not set: expected the cluster's project"
[[ -n ${IMAGE:-} ]] || fail "IMAGE is not set: expected an image made from launch/Dockerfile.tpu"
[[ -n ${STORAGE:-} ]] || fail "STORAGE is not set: expected the name of a storage of 'xpk storage list', on which the run's folder outlives the pods"
for word in "$@"; do
    [[ $word != --distributed ]] || fail "--distributed is added by this script: leave it out"
done

# 'exec', because xpk sends SIGTERM to what it started, which must be the program and not a shell before it. A spot node gives
# less than these ten minutes; a node that is drained gives them.
printf -v words ' %q' "$@"
call=(
    xpk workload create --workload="$NAME" --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT"
    --tpu-type="$TPU_TYPE" --docker-image="$IMAGE" --storage="$STORAGE"
    --max-restarts="${RESTARTS:-20}" --restart-on-exit-codes="$interrupted" --termination-grace-period-seconds=600
    --command=". /opt/jaxreason/launch/tpu.env && exec jaxreason$words --distributed"
)
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${call[@]}"
    printf '\n'
else
    command -v xpk >/dev/null || fail "there is no xpk: install it, into an environment of its own (pip install xpk)"
    exec "${call[@]}"
fi
