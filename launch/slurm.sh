# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034  # set by env.sh, and read by the script that sources this file
# One SLURM job: preflight, training, and another start of the same job after a stop or a failure. Sourced by
# slurm_fsdp.sbatch and slurm_deepspeed.sbatch, which define
#
#   launcher PORT NAME MODULE   fills the array `command` with this launcher's command line, up to the module's arguments
#   prepare                     makes what the launcher needs in $log_folder
#
# and set `follows` to the seconds that what is shown of a rank's own log may lag behind.

# read_allocation: the job's numbers, from SLURM. Outside of a job, for --dry-run, from the script's own #SBATCH lines.
read_allocation() {
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then
        job="$SLURM_JOB_ID" job_name="${SLURM_JOB_NAME:-job}"
        nodes="${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}"
        mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        ((${#hosts[@]} == nodes)) || die "scontrol names ${#hosts[@]} hosts in $SLURM_JOB_NODELIST, and SLURM says $nodes nodes"
        cpus="${SLURM_CPUS_ON_NODE:-1}"
    else
        [[ -n "$dry_run" ]] || die "this is a job script: sbatch $0 $*  (or --dry-run to see its commands)"
        job=0 job_name="$(sbatch_line job-name)" nodes="${SLURM_NNODES:-$(sbatch_line nodes)}" cpus=1
        mapfile -t hosts < <(seq -f 'node%g' "$nodes")
    fi
    if [[ -z "$ranks_per_node" ]]; then
        ranks_per_node="${SLURM_GPUS_ON_NODE:-}"
        if [[ -z "$ranks_per_node" && -z "${SLURM_JOB_ID:-}" ]]; then ranks_per_node="$(sbatch_line gpus-per-node)"; fi
        if [[ "${ranks_per_node:-0}" == 0 ]]; then ranks_per_node=1; fi
    fi
    restart="${SLURM_RESTART_COUNT:-0}"
    output="${output:-runs/$job_name-$job}"
    port="$(port_for "$job")"
}

# sbatch_line OPTION: its value in the script's own #SBATCH lines.
sbatch_line() { sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$0" | head -n 1; }

# on_all_nodes PORT NAME MODULE ARGUMENTS: fills `command` with what runs MODULE on every rank of the job.
on_all_nodes() {
    local srun=(
        srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" --cpu-bind=none
        --kill-on-bad-exit=1 --wait=60 --label "${APOLLO_SRUN[@]+"${APOLLO_SRUN[@]}"}"
    )
    launcher "$1" "$2" "$3"
    command=("${srun[@]}" bash "$APOLLO_ROOT/launch/node.sh" "${APOLLO_CONTAINER[@]+"${APOLLO_CONTAINER[@]}"}"
        "${command[@]}" "${@:4}")
}

run_job() {
    parse_options "$@"
    set_environment
    cd "$APOLLO_ROOT" || die "cannot enter $APOLLO_ROOT"
    read_allocation "$@"
    local arguments attempt="$job-$restart" code=0
    log_folder="$output/logs/$attempt"
    mapfile -t arguments < <(pretrain_options)
    on_all_nodes "$port" "$attempt-preflight" apollo_dist preflight --output "$output" --nodes "$nodes" \
        --ranks_per_node "$ranks_per_node" "${preflight_options[@]+"${preflight_options[@]}"}" \
        "${train_options[@]+"${train_options[@]}"}"
    local check=("${command[@]}")
    on_all_nodes $((port + 1)) "$attempt" apollo_dist.pretrain "${arguments[@]}"
    if [[ -n "$dry_run" ]]; then
        echo "# $nodes node(s) x $ranks_per_node rank(s), first node ${hosts[0]}, output $output"
        if [[ -n "$preflight" ]]; then show "${check[@]}"; fi
        show "${command[@]}"
        return
    fi

    trap ask USR1 TERM
    begin_attempt "$attempt"
    prepare
    say "job $job, start $restart of at most $((max_requeues + 1)): $nodes node(s) x $ranks_per_node rank(s) on ${hosts[*]}"
    say "output $output, newest checkpoint: step $step_before"
    if [[ -n "$preflight" ]]; then
        show "${check[@]}" >&2
        await "${check[@]}" || code=$?
        if ((code)) && [[ -z "$asked" ]]; then say "preflight failed: training is not started"; fi
    fi
    if [[ -z "$asked" ]] && ((code == 0)); then
        show "${command[@]}" >&2
        await "${command[@]}" || code=$?
        sleep "${follows:-0}"
    fi
    conclude "$code"
}

# conclude CODE: ends the job, or puts it into the queue again.
conclude() {
    local how
    how="$(outcome)"
    case "$how" in
        finished) say "finished; everything is in $output" && exit 0 ;;
        stopped) say "stopped by $output/STOP: not queued again; submit it with --output $output to go on" && exit 0 ;;
        broken)
            if ! may_be_the_node "$job" "$restart"; then
                say "failed before its first step (exit code $1): not queued again, since another start would fail the same way"
                exit "$1"
            fi
            say "failed before its first step (exit code $1), and not both starts before it did: another one is worth a try"
            ;;
    esac
    say "ended ($how, exit code $1) with the newest checkpoint at step $(newest_step)"
    local now
    now="$(scontrol show job "$job")" || die "scontrol show job $job failed; submit the job with --output $output to go on"
    # Still running, unless SLURM is ending it: scancel, or a save that outlasted the time limit. What was preempted or
    # lost a node SLURM queues again by itself.
    if [[ "$now" != *JobState=RUNNING* ]]; then
        say "SLURM is ending this job (scancel, or its time is over): not queued again from here;" \
            "submit it with --output $output to go on"
        exit 1
    fi
    # A node that was cut off may come back while the job already runs elsewhere.
    if [[ ! "$now" =~ Restarts=${restart}[^0-9] ]]; then
        say "SLURM has started this job anew meanwhile: this start ends"
        exit 1
    fi
    if ((restart >= max_requeues)); then
        say "started $((restart + 1)) times and --max_requeues is $max_requeues: not queued again;" \
            "submit it with --output $output to go on"
        exit 1
    fi
    say "back into the queue"
    scontrol requeue "$job" || die "scontrol requeue $job failed; submit the job with --output $output to go on"
    exit 0
}
