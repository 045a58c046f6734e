# Sourced by the batch scripts beside it.
#
# `step_with_requeue SIGNAL COMMAND...` runs a step of the job. SIGUSR1, which `--signal=B:USR1@120` sends to the batch
# shell two minutes before the time limit, is passed on to the step as SIGNAL. When the step has saved and ended, the job
# is queued again, under the same number, and the same script goes on. srun passes signals on to its tasks.

# shellcheck shell=bash
step_with_requeue() {
    local signal=$1 step="" is_told="" status=0
    shift
    trap 'is_told=1; [ -z "$step" ] || kill -s "$signal" "$step" 2>/dev/null || true' USR1
    "$@" &
    step=$!
    [ -z "$is_told" ] || kill -s "$signal" "$step"
    wait "$step" || status=$?
    while kill -0 "$step" 2>/dev/null; do # SIGUSR1 ends a wait, not the step
        status=0
        wait "$step" || status=$?
    done
    trap - USR1
    [ -n "$is_told" ] || return "$status"
    echo "the step has ended with $status after SIGUSR1: job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
