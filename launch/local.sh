#!/usr/bin/env bash
# Starts N processes of one jaxreason command on this machine, joined into one run: launch/local.sh N COMMAND [OPTION...]
#
#     DEVICES=4 launch/local.sh 2 train --config quickstart:tiny --workdir runs/two
#
# DEVICES    simulated CPU devices of each process; without it each uses what it finds
# JAXREASON  the command to start; without it '$PYTHON -m jaxreason', or 'jaxreason' where PYTHON is not set either
# GRACE      seconds that the others get after one has failed, before they are killed (default 15)
#
# Ctrl-C and SIGTERM are passed on once to every process, which finish their step and save. The exit code is 0, or the
# first other one that a process ended with.
set -eu

fail() {
    printf 'local.sh: %s\n' "$*" >&2
    exit 2
}

[[ $# -ge 2 ]] || fail "expected the number of processes and a command, for example: launch/local.sh 2 train --config quickstart:tiny --workdir runs/two"
[[ $1 =~ ^[1-9][0-9]{0,2}$ ]] || fail "the number of processes is '$1': expected a whole number from 1 to 999"
[[ ${DEVICES:-1} =~ ^[1-9][0-9]{0,2}$ ]] || fail "DEVICES is '$DEVICES': expected a whole number from 1 to 999"
[[ ${GRACE:-15} =~ ^[0-9]{1,4}$ ]] || fail "GRACE is '$GRACE': expected seconds as a whole number"
processes=$1
shift

if [[ -n ${JAXREASON:-} ]]; then
    command=("$JAXREASON")
elif [[ -n ${PYTHON:-} ]]; then
    command=("$PYTHON" -m jaxreason)
else
    command=(jaxreason)
fi
type "${command[0]}" >/dev/null 2>&1 ||
    fail "there is no '${command[0]}': activate the environment that jaxreason is installed in, or name its interpreter in PYTHON"

if [[ -n ${DEVICES:-} ]]; then
    export JAX_PLATFORMS=cpu
    # with its other scheduler XLA may send two sums in another order in each process, and Gloo then ends them
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_cpu_enable_concurrency_optimized_scheduler=false --xla_force_host_platform_device_count=$DEVICES"
    # simulated devices wait for each other in a pool of NPROC threads; with one a device, two sums can each hold half of them
    export NPROC="${NPROC:-$((4 * DEVICES))}"
fi

# A port is free when nobody answers on it. They are taken below the range that systems hand out to outgoing connections.
port=
for _ in {1..50}; do
    candidate=$((20000 + RANDOM % 10000))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
        port=$candidate
        break
    fi
done
[[ -n $port ]] || fail "found no free port between 20000 and 29999: stop what listens there"

pids=()
signalled=

send() { # SIGNAL: to every process that still runs
    local pid
    for pid in "${pids[@]}"; do
        kill "-$1" "$pid" 2>/dev/null || true
    done
}

# shellcheck disable=SC2329 # the traps call it
pass_on() {
    signalled=$1
    send "$1"
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM

# With job control each process is a group of its own, so that Ctrl-C reaches it through this script alone, and once.
set -m
for ((i = 0; i < processes; i++)); do
    "${command[@]}" "$@" --coordinator "localhost:$port" --processes "$processes" --process "$i" </dev/null &
    pids+=("$!")
    [[ -z $signalled ]] || send "$signalled" # it came while we were starting
done
set +m

# Looked at in turns, because the bash of macOS has no `wait -n`.
first=0
deadline=
running=("${pids[@]}")
while [[ ${#running[@]} -gt 0 ]]; do
    still=()
    for pid in "${running[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            still+=("$pid")
            continue
        fi
        code=0
        wait "$pid" 2>/dev/null || code=$?
        if [[ $code -ne 0 && $first -eq 0 ]]; then
            first=$code
            deadline=$((SECONDS + ${GRACE:-15}))
        fi
    done
    running=(${still[@]+"${still[@]}"})
    if [[ -n $deadline && ${#running[@]} -gt 0 && $SECONDS -ge $deadline ]]; then
        printf 'local.sh: a process ended with code %s, so the others are killed: without it they would wait for ever\n' "$first" >&2
        deadline=
        send KILL
    fi
    { sleep 0.2; } 2>/dev/null || true # Ctrl-C ends it too, of which bash would tell
done
exit "$first"
