#!/usr/bin/env bash
# shellcheck disable=SC2329  # functions that a trap calls
# One node's share of a job: started once on every node, it runs the launcher that its arguments name, with caches of
# its own; "{node}" in an argument stands for this node's number in the job.
#
#   srun --ntasks-per-node=1 bash launch/node.sh torchrun --node_rank {node} ...
#
# USR1 and TERM are passed on, as USR1, to the launcher and all processes under it. Launchers would end by USR1, so they
# are started with it ignored; a process under them that is still starting up ignores it as well, and the ranks of
# apollo_dist.pretrain stop by it once they listen.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=launch/attempt.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/attempt.sh"
set_environment

node="${SLURM_NODEID:-0}"
scratch="$(mktemp -d "${TMPDIR:-/tmp}/apollo-${SLURM_JOB_ID:-local}-$node-XXXXXX")"
trap 'rm -rf -- "$scratch"' EXIT
set_caches "$scratch"

# descendants PID: PID and all processes under it.
descendants() {
    local children pid
    echo "$1"
    read -r -a children < <(cat /proc/"$1"/task/*/children 2>/dev/null | tr '\n' ' ') || true
    for pid in "${children[@]+"${children[@]}"}"; do descendants "$pid"; done
}

# pass_on: the trap.
pass_on() {
    local pids
    mapfile -t pids < <(descendants "$launcher")
    kill -USR1 "${pids[@]}" 2>/dev/null || true # some may be gone by now
}

trap '' USR1 TERM # the children inherit this
"${@//\{node\}/$node}" &
launcher=$!
trap pass_on USR1 TERM
code=0
wait_for "$launcher" || code=$?
exit "$code"
