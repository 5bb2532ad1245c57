# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is read by the scripts that source this file
# What the launch scripts share: the environment of a job, the options, and when a run is continued. Sourced by
# slurm_fsdp.sbatch, slurm_deepspeed.sbatch, hostfile_deepspeed.sh, single_node.sh and, on every node, node.sh.
#
# Site settings (account, partition, modules, container) are read from launch/site.env; launch/site.env.example
# explains them.

APOLLO_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
APOLLO_VENV="${APOLLO_VENV:-$APOLLO_ROOT/.venv}"
APOLLO_SRUN=()      # more options for srun, set in site.env
APOLLO_CONTAINER=() # what comes before the launcher's command line, set in site.env
if [[ -f "$APOLLO_ROOT/launch/site.env" ]]; then
    # shellcheck source=launch/site.env.example
    source "$APOLLO_ROOT/launch/site.env"
fi

# say TEXT: one line of progress, with the time, since a job's log has none.
say() { printf '==> %(%F %T)T %s\n' -1 "$*" >&2; }

# die TEXT: the reason, and the end. No launch script continues a run after this.
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# ---- environment ------------------------------------------------------------------------------------------------

# set_environment: what every process of the job inherits.
set_environment() {
    if [[ -x "$APOLLO_VENV/bin/python" ]]; then
        export VIRTUAL_ENV="$APOLLO_VENV" PATH="$APOLLO_VENV/bin:$PATH"
    fi
    export PYTHONPATH="$APOLLO_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 MPLBACKEND=Agg TOKENIZERS_PARALLELISM=false
    # One thread for each rank's CPU work unless the site says otherwise; the GPU does the rest.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    # DeepSpeed calls collectives by names that torch is giving up: nothing that a reader of the log can change.
    export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}"

    # torchrun would end its ranks 30 s after a SIGTERM. SLURM sends SIGTERM to all processes of a step, so the ranks
    # hear of it themselves and stop when they have saved; torchrun is started with SIGTERM ignored (node.sh).
    export TORCHELASTIC_SIGNALS_TO_HANDLE="${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGINT}"

    # A rank whose peer is gone ends instead of waiting for ever; the flight recorder then says in which collective.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
    export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
    export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

    # Choices that depend on the cluster's network. Set them in site.env; `ip -br address` and `ibstat` show names.
    #   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   the interface of the first contact, if nodes have several
    #   export NCCL_IB_HCA=mlx5_0,mlx5_1                       InfiniBand adapters for data; default: all of them
    #   export NCCL_IB_GID_INDEX=3                             RoCE: the index of the RoCE v2 address
    #   export NCCL_IB_TIMEOUT=22                              large fabrics: more patience before an error
    #   export FI_PROVIDER=efa FI_EFA_USE_DEVICE_RDMA=1        AWS: EFA through the aws-ofi-nccl plugin
    #   export NCCL_IB_DISABLE=1                               no InfiniBand: TCP, slow; only to find a fault
    # Never set with FSDP: CUDA_DEVICE_MAX_CONNECTIONS=1 would stop communication and computation from overlapping.
    if [[ "${CUDA_DEVICE_MAX_CONNECTIONS:-}" == 1 ]]; then
        say "CUDA_DEVICE_MAX_CONNECTIONS=1 is removed: communication could not overlap computation"
        unset CUDA_DEVICE_MAX_CONNECTIONS
    fi
}

# set_caches FOLDER: this job's own caches, on this node. A lock that a killed job leaves in a shared cache of
# extensions would hang every later one.
set_caches() {
    export TMPDIR="$1" TORCH_EXTENSIONS_DIR="$1/extensions" TRITON_CACHE_DIR="$1/triton"
    export TORCHINDUCTOR_CACHE_DIR="$1/inductor"
}

# port_for NUMBER: a port that follows from a job's number, below the range that the kernel gives to clients.
port_for() { printf '%d\n' $((20000 + $1 * 10 % 12000)); }

# ---- options ----------------------------------------------------------------------------------------------------

LAUNCH_HELP="Options of the launch scripts (all others go to apollo_dist.pretrain):
  --dry-run                print the commands and do nothing
  --max_requeues N         continue the run at most N times after a stop or a failure (default 10)
  --ranks_per_node N       default: the GPUs of a node, or 1 without any
  --skip_preflight         train without looking at nodes, versions, disks and network first
  --min_gpu_memory SIZE    preflight: every GPU must have this much, such as 80GB
  --min_bandwidth GB/s     preflight: an all_reduce must reach this
  --step_timeout SECONDS   watchdog of pretrain: a step that takes longer ends the run (default 1800, 0: none)
  --output FOLDER          on storage that all nodes share; default: runs/NAME-JOBID"

# parse_options ARGUMENTS: fills the variables below. A NAME=VALUE word and the words NAME VALUE are the same.
parse_options() {
    dry_run="" preflight=1 max_requeues=10 ranks_per_node="" output="" step_timeout=1800
    preflight_options=() train_options=()
    local word value
    while (($#)); do
        word="${1%%=*}"
        case "$word" in
            --help | -h) printf '%s\n' "$LAUNCH_HELP" && exit 0 ;;
            --dry-run | --dry_run) dry_run=1 && shift && continue ;;
            --skip_preflight) preflight="" && shift && continue ;;
            --max_requeues | --ranks_per_node | --min_gpu_memory | --min_bandwidth | --step_timeout | --output) ;;
            *) train_options+=("$1") && shift && continue ;;
        esac
        if [[ "$1" == *=* ]]; then
            value="${1#*=}"
        else
            (($# > 1)) || die "$word needs a value"
            value="$2" && shift
        fi
        shift
        case "$word" in
            --max_requeues) max_requeues="$value" ;;
            --ranks_per_node) ranks_per_node="$value" ;;
            --step_timeout) step_timeout="$value" ;;
            --output) output="$value" ;;
            *) preflight_options+=("$word" "$value") ;;
        esac
    done
    [[ "$max_requeues" =~ ^[0-9]+$ ]] || die "--max_requeues is '$max_requeues': it must be a number"
    [[ "$ranks_per_node" =~ ^([1-9][0-9]*)?$ ]] || die "--ranks_per_node is '$ranks_per_node': it must be at least 1"
}

# show COMMAND: the command as one line that a shell would read back.
show() {
    printf '%q ' "$@" | sed 's/ $//; s/\\{node\\}/{node}/g'
    printf '\n'
}

# ---- one attempt, and whether to make another ---------------------------------------------------------------------

# newest_step: the step of the newest checkpoint, or 0.
newest_step() {
    local folder newest=0 step
    for folder in "$output"/checkpoints/step_*; do
        step="${folder##*/step_}" && step="${step%%_*}"
        if [[ -d "$folder" && "$step" =~ ^[0-9]+$ ]] && ((10#$step > newest)); then newest=$((10#$step)); fi
    done
    printf '%d\n' "$newest"
}

# pretrain_options: prints, one a line, what pretrain is called with. It resumes exactly if there is a checkpoint.
pretrain_options() {
    printf '%s\n' "${train_options[@]+"${train_options[@]}"}" --output "$output" --step_timeout "$step_timeout"
    if [[ " ${train_options[*]-} " != *" --resume"[\ =]* ]] && compgen -G "$output/checkpoints/step_*" >/dev/null; then
        printf '%s\n' --resume
    fi
}

# begin_attempt NAME: makes OUTPUT/logs/NAME, with a file whose age tells this attempt's files from older ones.
begin_attempt() {
    attempt_folder="$output/logs/$1"
    mkdir -p "$attempt_folder" || die "cannot write in $output: pass --output FOLDER"
    : >"$attempt_folder/started"
    step_before="$(newest_step)"
}

newer() { [[ -f "$output/$1" && "$output/$1" -nt "$attempt_folder/started" ]]; }

# trained_a_step: whether this attempt got further than the checkpoint that it began with.
trained_a_step() {
    local last
    newer metrics.jsonl || return 1
    last="$(sed -n 's/.*"step": \([0-9]*\).*/\1/p' "$output/metrics.jsonl" | tail -n 1)"
    ((${last:-0} > step_before))
}

# outcome: prints how the attempt ended: finished, stopped (the user's STOP), asked (by a signal), failed (after at
# least one step, so that another attempt has a chance) or broken. Launchers report one code for many reasons, so the
# files that pretrain leaves decide.
outcome() {
    if newer finished.json; then
        echo finished
    elif newer stopped.json && grep -q '"reason": "[^"]*STOP' "$output/stopped.json"; then
        echo stopped
    elif [[ -n "$asked" ]] || newer stopped.json; then
        echo asked
    elif trained_a_step; then
        echo failed
    else
        echo broken
    fi
}

# ---- processes and signals ----------------------------------------------------------------------------------------

asked="" child=""

# ask: the trap. Passes USR1 on to the child every 5 seconds: what is still starting up does not hear the first one.
ask() {
    if [[ -n "$asked" ]]; then return; fi
    asked=1
    say "asked to stop: the ranks save after their current step"
    if [[ -n "$child" ]]; then repeat_usr1 "$child" & fi
}

repeat_usr1() {
    trap - USR1 TERM
    while kill -USR1 "$1" 2>/dev/null; do sleep 5; done
}

# wait_for PID: waits for a child and returns its exit code. A trap ends the shell's `wait` early; its last one returns
# what it remembers.
wait_for() {
    local code=0
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    wait "$1" || code=$?
    return "$code"
}

# await COMMAND: runs it in the background, so that traps run at once, and returns its exit code.
await() {
    local code=0
    "$@" &
    child=$!
    if [[ -n "$asked" ]]; then repeat_usr1 "$child" & fi
    wait_for "$child" || code=$?
    child=""
    return "$code"
}
