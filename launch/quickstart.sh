#!/usr/bin/env bash
# From nothing to a trained LLaMA: makes the environment, then trains the tiny recipe (0.9 M parameters, bytes of this
# Python's own standard library, no download) with APOLLO under DeepSpeed ZeRO-2 on two ranks, 600 steps of
# 16 x 256 bytes. Under ten minutes on two cores. Ends with the summary and loss.png.
#
#   bash launch/quickstart.sh [options of apollo_dist.pretrain]
#
# for example
#
#   bash launch/quickstart.sh --optimizer adamw
#   bash launch/quickstart.sh --steps 100 --deepspeed_config ds_configs/zero1.json
#   bash launch/quickstart.sh --help
#
#   RANKS=2        how many processes; 1 by default on a machine with a single GPU, which two cannot share
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
cd "$APOLLO_ROOT"

# value_of KEY ARGUMENTS: prints what follows --KEY (or --KEY=) among the arguments; fails if it is not there.
value_of() {
    local key="--$1"
    shift
    while (($#)); do
        case "$1" in
            "$key") printf '%s\n' "${2:-}" && return 0 ;;
            "$key="*) printf '%s\n' "${1#*=}" && return 0 ;;
        esac
        shift
    done
    return 1
}

# free_output: makes and prints the first runs/quickstart-N that does not exist; mkdir decides, so two runs never share.
free_output() {
    local n=1
    mkdir -p runs || die "cannot make the folder runs in $PWD: pass --output FOLDER"
    until mkdir "runs/quickstart-$n" 2>/dev/null; do
        [[ -e "runs/quickstart-$n" ]] || die "cannot write in $PWD/runs: pass --output FOLDER"
        n=$((n + 1))
    done
    printf 'runs/quickstart-%d\n' "$n"
}

for argument in "$@"; do
    if [[ "$argument" == --help || "$argument" == -h ]]; then
        exec python -m apollo_dist.pretrain --help
    fi
done

# The quickstart's own options, each unless the caller gave it.
options=()
value_of recipe "$@" >/dev/null || options+=(--recipe tiny)
value_of engine "$@" >/dev/null || options+=(--engine deepspeed)
if [[ "$(value_of engine "$@" || echo deepspeed)" == deepspeed ]]; then
    value_of deepspeed_config "$@" >/dev/null || options+=(--deepspeed_config ds_configs/zero2.json)
fi
if ! output="$(value_of output "$@")"; then
    output="$(free_output)" || exit 1
    options+=(--output "$output")
fi

if [[ -z "${RANKS:-}" ]]; then
    RANKS=2
    if command -v nvidia-smi >/dev/null && [[ "$(python -c 'import torch; print(torch.cuda.device_count())')" == 1 ]]; then
        say "this machine has one GPU: one rank instead of two"
        RANKS=1
    fi
fi

# The launcher's fixed default port would let only one job run on a machine. Rank 0 listens on this one seconds from now:
# the kernel must not give it to another program by then, as it does with ports from 32768 on.
port="$(
    python - <<'EOF'
import random, socket
while True:
    port = random.SystemRandom().randrange(20000, 32768)
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
    print(port)
    break
EOF
)"
# One thread a rank: two ranks share two cores, and more threads would only wait for one another.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
# DeepSpeed calls collectives by names that torch is giving up: nothing that a reader of this output can change.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}"

say "training; everything is written to $output"
deepspeed --num_accelerators "$RANKS" --master_port "$port" --log_level warning --module apollo_dist.pretrain \
    "${options[@]+"${options[@]}"}" "$@"

if [[ -f "$output/loss.png" ]]; then
    say "loss curve: $(cd -- "$output" && pwd)/loss.png"
fi
