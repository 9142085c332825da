#!/usr/bin/env bash
# One node of a job: srun starts it once on each, it starts torchrun, which starts the ranks.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
trap : TERM USR1 # torchrun hears of it, too, and this script has a note to leave
container=()
eval "container=(${DISTKD_CONTAINER:-})"

ranks=${DISTKD_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}}
export NPROC=$((ranks > 0 ? ranks : 1))
given=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((given > NPROC ? given / NPROC : 1))}
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
if ((NPROC * OMP_NUM_THREADS > cores)); then
    echo "warning: $(hostname) lets this job use $cores cores for $NPROC ranks with $OMP_NUM_THREADS threads each:" \
        "ask for more (sbatch --cpus-per-task), or set OMP_NUM_THREADS" >&2
fi

if [[ -n ${DISTKD_INTERFACE:-} && ! -e /sys/class/net/$DISTKD_INTERFACE ]]; then
    there=$(cd /sys/class/net && echo *)
    echo "DISTKD_INTERFACE=$DISTKD_INTERFACE is no network interface of $(hostname), which has $there" >&2
    echo 2 >"$DISTKD_NOTES/code-$SLURM_NODEID"
    exit 2
fi

export NODE_RANK=$SLURM_NODEID NODES=$SLURM_NNODES RENDEZVOUS=static LOG_DIR=$DISTKD_LOGS/node-$SLURM_NODEID
# shellcheck disable=SC2016  # torch fills it in
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[${role_name} ${rank}] '
if [[ -n ${DISTKD_ELASTIC:-} ]]; then
    export NODES=$DISTKD_ELASTIC:$SLURM_NNODES RENDEZVOUS=c10d RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
fi

# each node reads its own notes only, and leaves one for the batch script
shared=$DISTKD_NOTES
export DISTKD_NOTES=$shared/node-$SLURM_NODEID
mkdir -p "$LOG_DIR" "$DISTKD_NOTES"
code=0
"${container[@]}" "$BASH" "$home/launch/multinode.sh" "$@" || code=$?
echo "$code" >"$shared/.code-$SLURM_NODEID"
mv "$shared/.code-$SLURM_NODEID" "$shared/code-$SLURM_NODEID"
# a polite stop is no failure: srun would end the nodes that still write the checkpoint
[[ $code -ne 3 ]] || code=0
exit "$code"
