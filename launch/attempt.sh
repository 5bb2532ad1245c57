# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # variables of env.sh, and of the scripts that source both
# One attempt at a run: what pretrain is called with, how it ended, and how a request to stop reaches its processes.

# ---- what an attempt is called with, and how it ended -------------------------------------------------------------

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

# may_be_the_node PREFIX START: whether a start that failed before its first step deserves another one: not both of the
# two starts before it, with the same options, failed like that, so the reason may be a node. SLURM makes it so itself: a
# node that was lost and comes back when the job may start again is told late to end the lost start, and ends the new one
# with it; while that one is being ended, the next may meet the same order.
may_be_the_node() {
    local before=$(($2 - 1))
    : >"$attempt_folder/broken"
    ((before >= 0)) || return 1
    [[ -e "$output/logs/$1-$before/broken" ]] || return 0
    ((before > 0)) && [[ ! -e "$output/logs/$1-$((before - 1))/broken" ]]
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

# follow FOLDER: shows what rank 0 writes, where the deepspeed launcher puts each rank's output into a file in FOLDER.
follow() {
    local log
    trap - USR1 TERM
    until log="$(compgen -G "$1/*_rank0.log")"; do sleep 0.5 && kill -0 $$ 2>/dev/null || return 0; done
    tail -n +1 --pid=$$ -f "$log"
}

# ---- attempts without a scheduler ---------------------------------------------------------------------------------

# run_here: preflight, then attempts until the run is over. The script that calls this defines
#
#   commands ATTEMPT   fills the arrays `check` and `command`: preflight, and training
run_here() {
    local number=0 code name
    name="$(date +%Y%m%d-%H%M%S)"
    log_folder="$output/logs/$name-0"
    commands 0
    if [[ -n "$dry_run" ]]; then
        if [[ -n "$preflight" ]]; then show "${check[@]}"; fi
        show "${command[@]}"
        return
    fi
    while :; do
        code=0
        begin_attempt "$name-$number"
        log_folder="$attempt_folder"
        commands "$number"
        if [[ -n "$preflight" && "$number" == 0 ]]; then
            show "${check[@]}" >&2
            await "${check[@]}" || { [[ -n "$asked" ]] || die "preflight failed: not started"; }
        fi
        if [[ -z "$asked" ]]; then
            show "${command[@]}" >&2
            await "${command[@]}" || code=$?
            sleep "${follows:-0}"
        fi
        case "$(outcome)" in
            finished) say "finished; everything is in $output" && return ;;
            stopped | asked) say "stopped; the same command with --output $output goes on" && return ;;
            broken)
                say "failed before its first step (exit code $code)"
                may_be_the_node "$name" "$number" || return "$code"
                ;;
        esac
        say "failed (exit code $code) with the newest checkpoint at step $(newest_step)"
        if ((number >= max_requeues)); then
            say "started $((number + 1)) times and --max_requeues is $max_requeues: not started again"
            return 1
        fi
        number=$((number + 1))
    done
}
