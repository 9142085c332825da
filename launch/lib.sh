# shellcheck shell=bash
# Sourced by the scripts beside it: which Python, how a torchrun is started, stopped politely and judged.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# interpreter: the Python that has distkd: the one that is named, an activated environment, the repository's own, or the
# system's
interpreter() {
    if [[ -n ${DISTKD_PYTHON:-} ]]; then
        echo "$DISTKD_PYTHON"
    elif [[ -n ${VIRTUAL_ENV:-} ]]; then
        echo "$VIRTUAL_ENV/bin/python"
    elif [[ -x $here/../.venv/bin/python ]]; then
        echo "$(cd "$here/.." && pwd)/.venv/bin/python"
    else
        echo python3
    fi
}
python=$(interpreter)

# A batch system says USR1 or TERM: without this flag USR1 kills torchrun and leaves its ranks behind.
signals=SIGTERM,SIGINT,SIGUSR1
# shellcheck disable=SC2034  # for the scripts that source this one
torchrun=(--signals-to-handle="$signals")

fail() {
    printf '%s: %s\n' "${script:-$(basename "$0")}" "$1" >&2
    exit 2
}

# gpus: CUDA devices that torch may use; torch is asked only where there is a driver
gpus() {
    if command -v nvidia-smi >/dev/null; then
        "$python" -c 'import torch; print(torch.cuda.device_count())'
    else
        echo 0
    fi
}

# show NAME=VALUE... ARGUMENTS...: the torchrun command with these variables and arguments, as it could be typed
show() {
    local variables=()
    while [[ ${1:-} =~ ^[A-Z_]+= ]]; do variables+=("$1") && shift; done
    "$python" -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' \
        "${variables[@]}" "$python" -m torch.distributed.run "$@"
}

# supervise COMMAND...: run it, pass signals on, wait for its end however often a signal interrupts; leaves $code
supervise() {
    local child
    "$@" &
    child=$!
    if [[ -n ${SLURM_PROCID:-} ]]; then
        trap : TERM USR1 # SLURM signals every process of a step itself: a second TERM would cut torchrun's shutdown short
    else
        # shellcheck disable=SC2064  # the child of now
        trap "kill -TERM $child 2>/dev/null || true" TERM
        # shellcheck disable=SC2064
        trap "kill -USR1 $child 2>/dev/null || true" USR1
    fi
    trap : INT # Ctrl-C reaches the child by itself: a second one would cut its shutdown short
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
}

# run_ranks ARGUMENTS...: run torchrun with these arguments and return the code that the ranks ended with
run_ranks() {
    local notes=${DISTKD_NOTES:-}
    if [[ -z $notes ]]; then
        notes=$(mktemp -d)
        # shellcheck disable=SC2064  # the folder of now
        trap "rm -rf '$notes'" EXIT
    fi
    DISTKD_NOTES=$notes supervise "$python" "$here/agent.py" "$@"
    "$python" "$here/exit_code.py" --torchrun "$code" --notes "$notes"
}
