# Sourced by the batch scripts beside it.
#
# `step_with_requeue SIGNAL STATUS COMMAND...` runs a step of the job. SIGUSR1, which `--signal=B:USR1@120` sends to the
# batch shell two minutes before the time limit, is passed on to the step as SIGNAL. If the step then ends with STATUS,
# it
# ended because of the signal: the job is queued again, with the same number, and the same script continues. If it ends
# with another status, it has finished (0) or failed, and the job gets that status. srun passes signals on to its tasks.
#
# If STATUS does not distinguish a stop from a failure, the script defines `has_progress`: a job without progress is not
# queued again.

# shellcheck shell=bash
step_with_requeue() {
    local signal=$1 stopped=$2 step="" is_told="" status=0
    shift 2
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
    if [ "$status" -ne "$stopped" ]; then
        echo "the step has ended with $status after SIGUSR1, not with $stopped: job $SLURM_JOB_ID is not queued again"
        return "$status"
    fi
    if declare -F has_progress >/dev/null && ! has_progress; then
        echo "the step has ended with $status and saved nothing new: job $SLURM_JOB_ID is not queued again"
        return "$((status ? status : 1))"
    fi
    echo "the step has ended with $status after SIGUSR1: job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
