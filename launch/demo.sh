#!/usr/bin/env bash
# From the digits that ship with the repository to a distilled student and the report about it, on two CPU ranks.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TEXT'
usage: launch/demo.sh [RUN_ROOT]

Makes shards of the embedded digits (six views of each), trains a teacher that sees all views and three students that
see one weak view: alone, with logit KD, with DC-Distill + GK-Refine; five seeds each, once with all 1,200 labels and
once with 200. Ends with the report.
A second call goes on where the first one stopped. RUN_ROOT is runs/demo unless given; SEEDS is 0-4 unless set.
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi
cd "$here/.."
root=${1:-runs/demo}
shards=$root/shards/uci_mfeat # where the configs look for it below their run root
export OMP_NUM_THREADS=1

[[ -f $shards/manifest.json ]] || "$python" shards/uci_mfeat.py --out "$shards"
for setting in uci_mfeat uci_mfeat_few; do
    configs=()
    for name in teacher student_alone logit_kd dc_distill; do configs+=("configs/$setting/$name.yaml"); done
    launch/workstation.sh --nproc 2 "${configs[@]}" --seeds "${SEEDS:-0-4}" \
        --run.root "$root" --engine.device cpu
done
"$python" -m distkd.cli report "$root"
echo "open the report: $root/report/index.html"
