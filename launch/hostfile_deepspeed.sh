#!/usr/bin/env bash
# Trains with DeepSpeed on machines without a scheduler: pdsh and ssh start its launcher on every host of a hostfile.
#
#   bash launch/hostfile_deepspeed.sh --hostfile hosts --recipe 13B --output /shared/runs/13B [options]
#   bash launch/hostfile_deepspeed.sh --hostfile hosts --dry-run ...  prints the commands;  --help  lists the options
#
# The hostfile has a line "NAME slots=GPUS" for each host. It needs pdsh here, ssh from here to every host without a
# password, and this repository, its environment and OUTPUT at the same paths everywhere.
#
# TERM, USR1 or Ctrl-C make a file OUTPUT/STOP, by which all ranks save and stop; the same command then goes on.
set -euo pipefail
folder="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/env.sh
source "$folder/env.sh"
# shellcheck source=launch/attempt.sh
source "$folder/attempt.sh"

# This script's own options; the rest are those of every launch script.
hostfile="" master="" rest=()
while (($#)); do
    case "$1" in
        --hostfile=*) hostfile="${1#*=}" ;;
        --hostfile) hostfile="${2:?--hostfile needs a value}" && shift ;;
        --master_addr=*) master="${1#*=}" ;;
        --master_addr) master="${2:?--master_addr needs a value}" && shift ;;
        *) rest+=("$1") ;;
    esac
    shift
done
parse_options "${rest[@]+"${rest[@]}"}"
set_environment
[[ -f "$hostfile" ]] || die "--hostfile '$hostfile' is no file: give one with a line 'NAME slots=GPUS' for each host"
hostfile="$(realpath -- "$hostfile")"
cd "$APOLLO_ROOT"
# The slots of all hosts: preflight compares them with what it finds.
mapfile -t slots < <(sed -n 's/^ *\([^# ][^ ]*\)  *slots=\([0-9][0-9]*\).*/\1 \2/p' "$hostfile")
((${#slots[@]} > 0)) || die "$hostfile has no line 'NAME slots=GPUS'"
master="${master:-${slots[0]% *}}"
ranks_per_node="${ranks_per_node:-${slots[0]#* }}"
output="${output:-runs/hostfile-$(date +%Y%m%d-%H%M%S)}"
if [[ " ${train_options[*]-} " != *" --engine"[\ =]* ]]; then train_options+=(--engine deepspeed); fi
if [[ " ${train_options[*]-} " != *" --deepspeed_config"[\ =]* ]]; then
    train_options+=(--deepspeed_config ds_configs/zero2_bf16.json)
fi
if [[ -z "$dry_run" ]] && ! command -v pdsh >/dev/null; then
    die "pdsh is not installed: apt-get install pdsh, or take single_node.sh for one machine"
fi

# ssh brings no environment: the launcher exports what this file says, on every host.
write_environment() {
    set_caches "/tmp/apollo-$$"
    local name
    for name in $(compgen -e | grep -E '^(CUDA|FI|GLOO|HF|LD_LIBRARY|MPLBACKEND|NCCL|OMP|ONEDNN|TOKENIZERS|TORCH|TRANSFORMERS|TRITON|WANDB)'); do
        if [[ "${!name}" != *[\"\$\`$'\n']* ]]; then printf '%s=%s\n' "$name" "${!name}"; fi
    done >"$1"
}

launcher() {
    command=(
        env DS_ENV_FILE="$(realpath -m -- "$log_folder")/environment" setsid
        deepspeed --hostfile "$hostfile" --launcher pdsh --force_multi --master_addr "$master" --master_port "$1"
        --no_local_rank --log_level warning
    )
    # Each rank's log is a file then; preflight's table is for whoever started this.
    if [[ "$2" == apollo_dist.pretrain ]]; then command+=(--enable_each_rank_log "$(realpath -m -- "$log_folder")/ranks"); fi
    command+=(--module "$2")
}

follows=2
commands() {
    local port arguments
    port=$(($(port_for $$) + 2 * ($1 % 5)))
    mapfile -t arguments < <(pretrain_options)
    if [[ -d "$log_folder" ]]; then
        write_environment "$log_folder/environment"
        mkdir -p "$log_folder/ranks" # before the nodes' launchers, which fail if another one makes it at the same moment
        follow "$log_folder/ranks" &
    fi
    launcher "$port" apollo_dist
    check=("${command[@]}" preflight --output "$output" --nodes "${#slots[@]}" --ranks_per_node "$ranks_per_node"
        "${preflight_options[@]+"${preflight_options[@]}"}" "${train_options[@]}")
    launcher $((port + 1)) apollo_dist.pretrain
    command+=("${arguments[@]}")
}

# shellcheck disable=SC2329,SC2034  # the trap; read in attempt.sh
stop() {
    say "asked to stop: made $output/STOP; the ranks save after their current step"
    : >"$output/STOP"
    asked=1 # if it came during preflight, training does not begin
}
trap stop USR1 TERM INT
run_here
