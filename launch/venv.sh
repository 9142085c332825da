#!/usr/bin/env bash
# Makes .venv/ in this repository, or brings it up to date: `make` calls this. Nothing is installed outside of .venv/.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/venv.sh

Makes .venv/ with torch at its pin first, then distkd and its development tools (versions in constraints.txt).

environment:
  PYTHON        interpreter to use (default: the first of python3, python3.14 ... python3.11 that is 3.11 or newer)
  TORCH_INDEX   package index for torch alone, for example one of CPU builds, which saves
                some gigabytes on a machine without an NVIDIA GPU
TEXT
}

fail() {
    printf 'venv.sh: %s\n' "$@" >&2
    exit 2
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate found=""
    # shellcheck disable=SC2086  # several names in one variable, to be split
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
        if command -v "$candidate" >/dev/null; then
            found+="$candidate is $("$candidate" --version 2>&1); "
        fi
    done
    fail "no Python 3.11 or newer: ${found:-${PYTHON:-python3} is not installed; }install one, for example" \
        "  sudo apt-get install python3 python3-venv           (Debian 12, Ubuntu 24.04 and newer)" \
        "  sudo apt-get install python3.11 python3.11-venv     (Ubuntu 22.04)" \
        "or name one that is there: PYTHON=/path/to/python3.11"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
elif [[ $# -gt 0 ]]; then
    fail "unknown argument '$1'; see launch/venv.sh --help"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/.complete
rm -f "$stamp" # an installation that fails below must not look finished

if ! is_new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    # Debian splits these off: the module venv is there, what it needs is not
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        fail "$python cannot make virtual environments: its modules venv or ensurepip are missing; install them with" \
            "  sudo apt-get install $version-venv     (or: sudo apt-get install python3-venv)"
    fi
    echo "making .venv with $python"
    "$python" -m venv --clear .venv
fi

pip=(.venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt)
[[ -t 1 ]] || pip+=(--quiet --progress-bar off)
index=()
if [[ -n ${TORCH_INDEX:-} ]]; then
    # beside the default index: 2.13.0+cpu counts as newer than 2.13.0, and the pin admits both
    index=(--extra-index-url "$TORCH_INDEX")
elif ! command -v nvidia-smi >/dev/null; then
    echo "no NVIDIA GPU seen: TORCH_INDEX=URL, an index of CPU builds, would save gigabytes of CUDA"
fi
echo "installing torch and distkd into .venv: some minutes the first time"
# torch first and alone: a package that merely asks for torch would bring in the newest one
"${pip[@]}" ${index[@]+"${index[@]}"} torch numpy
"${pip[@]}" --editable '.[dev,deepspeed]'
# for its tests: what it asks for beside torch is torchvision, which has no build for every torch and is stood in for
"${pip[@]}" --no-deps timm
.venv/bin/python -c 'import distkd, torch; print(f"ready: distkd {distkd.__version__}, torch {torch.__version__}")'
touch "$stamp"
