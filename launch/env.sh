# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is read by the scripts that source this file
# What the launch scripts share: the environment of a job and its options. Sourced by slurm_fsdp.sbatch,
# slurm_deepspeed.sbatch, hostfile_deepspeed.sh, single_node.sh and, on every node, node.sh; attempt.sh has the rest.
#
# Site settings (account, partition, modules, container) are read from launch/site.env, or the file APOLLO_SITE;
# launch/site.env.example explains them.

APOLLO_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
APOLLO_VENV="${APOLLO_VENV:-$APOLLO_ROOT/.venv}"
APOLLO_SRUN=()      # more options for srun, set in site.env
APOLLO_CONTAINER=() # what comes before the launcher's command line, set in site.env
APOLLO_SITE="${APOLLO_SITE:-$APOLLO_ROOT/launch/site.env}"
if [[ -f "$APOLLO_SITE" ]]; then
    # shellcheck source=launch/site.env.example
    source "$APOLLO_SITE"
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
            [[ $# -gt 1 && "$2" != --* ]] || die "$word needs a value"
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
