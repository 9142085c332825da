#!/usr/bin/env bash
# Teacher, then student: two launches, the second only when the first is done.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TEXT'
usage: launch/stages.sh TEACHER.yaml STUDENT.yaml [--print] [--nproc N] [--section.field VALUE ...]

Trains the teacher, then the student that names its export, each under a torchrun of its own, so that a stage that is
done is not started again with the other one. Options go to both stages. On several nodes (NODES is set) the stages are
launched by multinode.sh, otherwise by workstation.sh; their --help lists what else can be set.

exit code: of the first stage that did not end with 0
example: launch/stages.sh configs/tiny/teacher.yaml configs/tiny/dc_distill.yaml --nproc 2 --run.root runs/try
TEXT
}

for argument in "$@"; do
    [[ $argument != -h && $argument != --help ]] || { usage && exit 0; }
done
[[ $# -ge 2 && $1 == *.y*ml && $2 == *.y*ml ]] || fail "two config files come first: TEACHER.yaml STUDENT.yaml"
teacher=$1 student=$2
shift 2

launcher=$here/workstation.sh
[[ -z ${NODES:-} ]] || launcher=$here/multinode.sh
for config in "$teacher" "$student"; do
    supervise "$launcher" "$config" "$@"
    [[ $code -eq 0 ]] || exit "$code"
done
