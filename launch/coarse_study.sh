#!/usr/bin/env bash
# Does inter-resolution distillation help? Lung tiles at 112 px, students at 56, 28 and 14 px, with all labels and few.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TEXT'
usage: launch/coarse_study.sh RAW [ROOT]

RAW is the folder of the LC25000 lung tiles (labels.csv and images/). For all labels, 150 and 60, five seeds each: a
teacher at 112 px, then at 56, 28 and 14 px the student alone, logit KD, feature matching, CAT and AT+. Students run at
their own size; PROTOCOL=reference restores the teacher's size in front of them, as published. Of a tile of 112 px the
networks see crops of 96, 48, 24 and 12 px.
A second call goes on where the first one stopped. ROOT is runs/coarse unless given. LABELS, PIXELS, SEEDS narrow it
down: LABELS="null 60" PIXELS="28" SEEDS=0-1. Ends with a report for each size and number of labels.
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help || $# -lt 1 ]]; then
    usage
    exit $(($# < 1 ? 2 : 0))
fi
[[ -d $1 ]] || fail "no folder '$1'; see launch/coarse_study.sh --help"
raw=$(realpath "$1")
root=$(realpath -m "${2:-runs/coarse}")
cd "$here/.."
protocol=${PROTOCOL:-native}
case $protocol in
    native) restore=false ;;
    reference) restore=true ;;
    *) fail "PROTOCOL is '$protocol', expected native or reference" ;;
esac
for pixels in ${PIXELS:-56 28 14}; do
    if [[ ! $pixels =~ ^[1-9][0-9]*$ ]] || ((112 % pixels || 96 % (112 / pixels))); then
        fail "PIXELS has '$pixels', expected 56, 28, 14 or 7"
    fi
done
shards=$root/shards
configs=configs/lc25000_coarse
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

[[ -f $shards/manifest.json ]] || "$python" shards/lc25000_lung.py --raw "$raw" --out "$shards" --coarse
for labels in ${LABELS:-null 150 60}; do
    common=(--data.shards "$shards" --data.labelled "$labels" --seeds "${SEEDS:-0-4}")
    teachers=$root/labels-$labels/teacher
    "$python" -m distkd.cli train $configs/teacher.yaml "${common[@]}" --run.root "$teachers"
    for pixels in ${PIXELS:-56 28 14}; do
        students=$root/labels-$labels/$pixels-px-$protocol
        # four stages would leave a map of one place, in which there is nowhere to look
        stages=()
        [[ $protocol == native ]] && ((pixels < 28)) && stages=(--model.encoders.coarse.widths '[32, 64, 128]')
        "$python" -m distkd.cli train $configs/{student_alone,logit_kd,features,cat,at_plus}.yaml "${common[@]}" \
            --run.root "$students" --teacher.export "$teachers/lc25000_coarse-teacher-seed{seed}" \
            --data.degraded.coarse.factor $((112 / pixels)) --data.degraded.coarse.restore $restore \
            ${stages[@]+"${stages[@]}"}
        "$python" -m distkd.cli report "$teachers" "$students" --output "$students/report"
    done
done
