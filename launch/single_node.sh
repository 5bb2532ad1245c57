#!/usr/bin/env bash
# Trains on this machine: preflight, then the launcher that the engine needs, again from the newest checkpoint if it
# fails (--max_requeues times).
#
#   bash launch/single_node.sh --recipe 7B --output runs/7B [options]                     FSDP2, torchrun
#   bash launch/single_node.sh --recipe 13B-DDP --engine ddp [options]
#   bash launch/single_node.sh --deepspeed_config ds_configs/zero2_bf16.json [options]     the deepspeed launcher
#   bash launch/single_node.sh --dry-run ...  prints the commands;  --help  lists the options
#
# TERM, USR1, Ctrl-C or a file OUTPUT/STOP make all ranks save and stop; the same command then goes on.
set -euo pipefail
folder="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/env.sh
source "$folder/env.sh"
# shellcheck source=launch/attempt.sh
source "$folder/attempt.sh"

parse_options "$@"
set_environment
cd "$APOLLO_ROOT"
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" || gpus=0
ranks_per_node="${ranks_per_node:-$((gpus > 0 ? gpus : 1))}"
output="${output:-runs/single-$(date +%Y%m%d-%H%M%S)}"
has() { [[ " ${train_options[*]-} " == *" --$1"[\ =]* ]]; }
if has deepspeed_config && ! has engine; then train_options+=(--engine deepspeed); fi
if ! has engine; then train_options+=(--engine fsdp2); fi

launcher() {
    if has deepspeed_config; then
        command=(
            deepspeed --num_accelerators "$ranks_per_node" --master_port "$1" --no_local_rank --log_level warning
            --module "$2"
        )
    else
        command=(
            torchrun --nnodes 1 --nproc_per_node "$ranks_per_node" --master_addr 127.0.0.1 --master_port "$1"
            --max_restarts 0 --log_dir "$log_folder" --redirects 3 --tee 3 -m "$2"
        )
    fi
    # In a session of its own: Ctrl-C is for this script, which passes a request to save on.
    command=(setsid bash "$APOLLO_ROOT/launch/node.sh" "${APOLLO_CONTAINER[@]+"${APOLLO_CONTAINER[@]}"}" "${command[@]}")
}

commands() {
    local port arguments
    port=$(($(port_for $$) + 2 * ($1 % 5)))
    mapfile -t arguments < <(pretrain_options)
    launcher "$port" apollo_dist
    check=("${command[@]}" preflight --output "$output" --nodes 1 --ranks_per_node "$ranks_per_node"
        "${preflight_options[@]+"${preflight_options[@]}"}" "${train_options[@]}")
    launcher $((port + 1)) apollo_dist.pretrain
    command+=("${arguments[@]}")
}

trap ask USR1 TERM INT
run_here
