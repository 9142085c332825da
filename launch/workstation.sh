#!/usr/bin/env bash
# One machine: a rank per GPU, or some ranks on the CPU.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TEXT'
usage: launch/workstation.sh [--nproc N] [--max-restarts N] [--print] CONFIG... [--section.field VALUE ...]

Trains one stage per config, in order, on all GPUs of this machine, or on N CPU ranks. Whatever is not listed here goes
to `distkd train`. Start it again after a stop: it goes on from the last checkpoint.

options:
  --nproc N         ranks (default: one per GPU; without a GPU 2, or 1 on a single core)
  --max-restarts N  start all ranks again when one is lost, at most N times (default 0)
  --print           print the torchrun command that this amounts to, and stop
  -h, --help        show this

environment:
  OMP_NUM_THREADS   threads per rank (default: cores / ranks)
exit code: 0 done, 2 error in config, data or arguments, 3 interrupted with a complete checkpoint, 1 anything else
example: launch/workstation.sh --nproc 2 configs/tiny/teacher.yaml configs/tiny/dc_distill.yaml
TEXT
}

nproc="" max_restarts=0 print="" arguments=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --nproc | --max-restarts)
            [[ ${2:-} =~ ^[0-9]+$ ]] || fail "$1 needs a whole number, found '${2:-}'"
            if [[ $1 == --nproc ]]; then nproc=$2; else max_restarts=$2; fi
            shift 2
            ;;
        --nproc=* | --max-restarts=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --print) print=yes && shift ;;
        -h | --help) usage && exit 0 ;;
        *) arguments+=("$1") && shift ;;
    esac
done
[[ ${#arguments[@]} -gt 0 ]] || fail "no config given; for example: launch/workstation.sh configs/tiny/teacher.yaml"
[[ $nproc != 0 ]] || fail "--nproc must be at least 1"

cores=$(nproc)
if [[ -z $nproc ]]; then
    nproc=$(gpus)
    [[ $nproc -gt 0 ]] || nproc=$((cores > 1 ? 2 : 1))
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
# otherwise ranks that are started again find the addresses of the dead ones in the old store: refused, or a long wait
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

command=("${torchrun[@]}" --standalone --nproc-per-node="$nproc" --max-restarts="$max_restarts"
    "$here/train.py" "${arguments[@]}")
if [[ -n $print ]]; then
    show OMP_NUM_THREADS="$OMP_NUM_THREADS" TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "${command[@]}"
    exit 0
fi
run_ranks "${command[@]}"
