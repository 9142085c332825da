# shellcheck shell=bash
# Sourced by the batch scripts beside it: what a job needs, how its ranks are started, warned, and judged.
# They set $home, the clone, and $script, their name.

script=slurm/$(basename "${script:?the batch script says its name}")
warned="" killed="" overdue="" timer="" code=0 steps=0 options=() runs=() container=()
trap 'warned=yes' USR1 # from the first moment on: SLURM ends a script that has no answer
trap 'killed=yes' TERM
# shellcheck source=launch/lib.sh
source "$home/launch/lib.sh"
home=$(cd "$home" && pwd)

# say TEXT: to the job's log, with time, job and attempt
say() {
    printf '[%s job %s attempt %s] %s\n' "$(date '+%F %T')" "$job" "$attempt" "$*"
}

# need_job "$@": whether this runs as a job; outside of one, say what to type instead, and stop
need_job() {
    local words instead follow
    [[ $# -gt 0 && $1 != -h && $1 != --help ]] || { usage && exit $(($# == 0 ? 2 : 0)); }
    [[ -z ${SLURM_JOB_ID:-} ]] || return 0
    words=$(printf ' %q' "$@")
    instead="launch/workstation.sh$words   several without a batch system: launch/multinode.sh --help"
    follow="with the jobs that follow:  distkd submit$words"
    if [[ $script == */report.sbatch ]]; then
        instead="distkd report$words" follow="without a job:  distkd report$words"
    fi
    if command -v sbatch >/dev/null; then
        fail "this is a job script; submit it:  sbatch $(printf %q "$home/$script")$words   or, $follow"
    fi
    fail "there is no SLURM here (no sbatch); on this machine:  $instead"
}

# identify: $job as people see it and $attempt, as the controller knows them; a job that was submitted from within another
# one may have that one's variables
identify() {
    local facts
    facts=$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null | grep "^JobId=$SLURM_JOB_ID ") || facts=""
    if [[ -n $facts ]]; then
        [[ $facts == *" ArrayTaskId="* ]] || unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
        [[ ! $facts =~ \ Restarts=([0-9]+) ]] || export SLURM_RESTART_COUNT=${BASH_REMATCH[1]}
    fi
    attempt=${SLURM_RESTART_COUNT:-0} # unset in the first run
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
    job=${job:-$SLURM_JOB_ID}
}

# read_site: the site's settings; what is already in the environment wins
read_site() {
    local given site=${DISTKD_SITE:-}
    [[ -n $site || ! -f $home/slurm/site.env ]] || site=$home/slurm/site.env
    [[ -n $site ]] || return 0
    [[ -f $site ]] || fail "DISTKD_SITE names no file: $site; copy slurm/site.env.example and fill it in"
    given=$(export -p | sed -n 's/^declare -x \(DISTKD_[A-Z_]*=\)/export \1/p')
    set -a
    # shellcheck source=/dev/null
    source "$site"
    set +a
    eval "$given"
}

# load_software: modules and setup of the site, and the interpreter; the tools of others do not bear strict shells
load_software() {
    local before=$PWD
    set +eu
    if [[ -n ${DISTKD_MODULES:-} ]]; then
        # shellcheck source=/dev/null
        type module >/dev/null 2>&1 || source /etc/profile.d/modules.sh || source /etc/profile.d/lmod.sh
        # shellcheck disable=SC2086  # several words
        module load $DISTKD_MODULES || fail "module load $DISTKD_MODULES failed (DISTKD_MODULES of the site's settings)"
    fi
    # shellcheck source=/dev/null
    [[ -z ${DISTKD_SETUP:-} ]] || source "$DISTKD_SETUP" || fail "DISTKD_SETUP=$DISTKD_SETUP failed"
    cd "$before" || exit 1 # the setup may have gone elsewhere
    set -eu
    eval "container=(${DISTKD_CONTAINER:-})" # its words may be quoted
    python=$(interpreter)
    [[ ${#container[@]} -eq 0 || -n ${DISTKD_PYTHON:-} ]] || python=python3 # that of the image
    export DISTKD_PYTHON=$python
    "${container[@]}" "$python" -c 'import sys; assert sys.version_info >= (3, 11)'
}

# address_of NODE: its name where it resolves, the address that SLURM knows otherwise
address_of() {
    if getent hosts "$1" >/dev/null; then
        printf '%s' "$1"
    else
        scontrol show node "$1" | sed -n '/NodeAddr=/s/.*NodeAddr=\([^ ]*\).*/\1/p'
    fi
}

# enough_time: a job that is warned as soon as it starts would take one step at each attempt
enough_time() {
    local left lead=${DISTKD_LEAD:-120}
    left=$(squeue -h -j "$SLURM_JOB_ID" -O TimeLimit:32 2>/dev/null | head -n 1 | tr -d ' ') || left=""
    [[ $left =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):([0-9]+)$ ]] || return 0 # UNLIMITED, or nobody answers
    left=$(((10#0${BASH_REMATCH[2]} * 24 + 10#0${BASH_REMATCH[4]}) * 3600 + 10#${BASH_REMATCH[5]} * 60 + 10#${BASH_REMATCH[6]}))
    ((left > 2 * lead)) || fail "a time limit of $left s is too short for a warning $lead s before its end: sbatch --time, or \
a shorter lead: sbatch --signal=B:USR1@SECONDS and DISTKD_LEAD=SECONDS, 60 or more"
}

# value_of OPTION "$@": the last value of OPTION in the arguments, `--option value` or `--option=value`
value_of() {
    local option=$1 found="" previous="" argument
    shift
    for argument in "$@"; do
        [[ $previous == "$option" ]] && found=$argument
        [[ $argument == "$option="* ]] && found=${argument#*=}
        previous=$argument
    done
    printf '%s' "$found"
}

# begin "$@": everything that the ranks need, in the environment; the job's folder; the traps
begin() {
    local nodes root word
    need_job "$@"
    for word in "$@"; do
        [[ $word != *.y*ml || -r $word ]] ||
            fail "config $word cannot be read in $PWD: relative paths are those of the folder that is submitted from"
    done
    read_site
    identify
    enough_time
    root=$(value_of --run.root "$@")
    folder=${DISTKD_JOBS:-${root:-runs}/slurm}/$job
    mkdir -p "$folder/notes.$attempt" "$folder/logs.$attempt"
    chmod 700 "$folder" # logs may name patients
    folder=$(cd "$folder" && pwd)
    [[ $attempt -gt 0 ]] || rm -f "$folder/requeues.json" "$folder/broken" # of another cluster's job of this number

    # the ranks look into it: whatever stands there means stop
    export DISTKD_STOP_FILE=$folder/stop.$attempt DISTKD_NOTES=$folder/notes.$attempt DISTKD_LOGS=$folder/logs.$attempt
    : >"$DISTKD_STOP_FILE"
    trap 'warned=yes; stop "USR1: the end of this attempt is near"' USR1
    trap 'killed=yes; stop "TERM: SLURM ends this job"' TERM
    trap 'overdue=yes' USR2
    [[ -z $warned$killed ]] || stop "the end of this attempt was announced before its ranks were started"
    load_software || broken

    readarray -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=$(address_of "${nodes[0]}")
    export MASTER_ADDR PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    # a step of srun does not inherit it since 22.05
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    if [[ -n ${DISTKD_INTERFACE:-} ]]; then # gloo takes one exact name, NCCL a pattern
        export GLOO_SOCKET_IFNAME=$DISTKD_INTERFACE NCCL_SOCKET_IFNAME="=$DISTKD_INTERFACE"
    fi
    [[ -z ${DISTKD_SCRATCH:-} ]] || options+=(--data.scratch "$DISTKD_SCRATCH") # its $NAMES are the node's
    [[ -z ${DISTKD_METRICS:-} ]] || options+=(--metrics.export "$DISTKD_METRICS")
    say "nodes $SLURM_JOB_NODELIST, interface ${DISTKD_INTERFACE:-chosen by the libraries}, folder $folder"
}

# stop WHY: ask the ranks to stop; they agree on a step and write a checkpoint
stop() {
    say "asks the ranks to stop: $1"
    # somebody may have tidied up; then the ranks are signalled, and what they have started with them
    { mkdir -p "$folder" && echo "$1" >>"$DISTKD_STOP_FILE"; } || scancel --signal=USR1 "$job" || true
    if [[ -n $warned && -z $timer ]]; then
        # an evaluation does not look up: before SLURM ends everything, this script goes back to the queue without it
        { sleep $((${DISTKD_LEAD:-120} * 2 / 3)) && kill -USR2 $$; } 2>/dev/null &
        timer=$!
    fi
}

# on_nodes COMMAND...: run it once on every node and wait for its end however often a signal interrupts; leaves $code
on_nodes() {
    local child srun=(--ntasks="$SLURM_NNODES" --ntasks-per-node=1 --export=ALL --label)
    if [[ -n ${DISTKD_ELASTIC:-} ]]; then
        srun+=(--no-kill --kill-on-bad-exit=0 --wait=0)
    else
        srun+=(--kill-on-bad-exit=1 --wait=300)
    fi
    srun "${srun[@]}" "$@" &
    child=$!
    code=0
    wait "$child" || code=$?
    while [[ -z $overdue ]] && kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
}

# stage_in ARGUMENTS...: copy the shards to the nodes' own disks, before there are ranks that wait for each other
stage_in() {
    code=0
    [[ -n ${DISTKD_SCRATCH:-} ]] || return 0
    say "copies shards to $DISTKD_SCRATCH of each node"
    on_nodes "${container[@]}" "$python" -m distkd.cli train "${options[@]}" "$@" --stage-in
}

# train ARGUMENTS...: one `distkd train` over all nodes; leaves in $code how its ranks ended
train() {
    rm -rf "${DISTKD_NOTES:?}"/* # of a stage before this one
    stage_in "$@"
    if [[ $code -eq 0 ]]; then
        # another port for each attempt and step, below those that the system gives to clients
        export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 16 + attempt % 4 * 4 + steps % 4) % 20000))
        steps=$((steps + 1))
        say "starts the ranks, which meet at $MASTER_ADDR:$MASTER_PORT; it may take a minute until they speak"
        on_nodes "$BASH" "$home/slurm/node.sh" "${options[@]}" "$@"
        local launched=$code
        code=0
        "${container[@]}" "$python" "$home/launch/exit_code.py" --torchrun "$launched" --notes "$DISTKD_NOTES" || code=$?
        readarray -t -O ${#runs[@]} runs < <(sort -u "$DISTKD_NOTES"/node-*/run-* 2>/dev/null)
    fi
    [[ -z $overdue ]] || code=3
}

# given_up: whether SLURM has the job in the queue again: it took this node for dead, where this script lives on
given_up() {
    [[ $(scontrol show job "$job" 2>/dev/null) =~ \ Restarts=([0-9]+) && ${BASH_REMATCH[1]} -gt $attempt ]]
}

# withdraw: remove what killed ranks have announced to Prometheus
withdraw() {
    [[ ${#runs[@]} -eq 0 ]] || "${container[@]}" "$python" -m distkd.metrics.targets --remove "${runs[@]}" --job "$job" || true
}

# requeue: does not return where SLURM takes the job back
requeue() {
    local answer
    for _ in 1 2 3 4 5; do
        [[ -z $killed ]] || return 0 # cancelled meanwhile
        # the number of an array's last task is that of the whole array: only the form 17_3 means one task
        if answer=$(scontrol requeue "$job" 2>&1); then
            trap 'exit 0' TERM # SLURM ends this script, and what it waits for, in this order or the other
            for _ in {1..60}; do
                sleep 5 &
                wait $! || true
            done
        fi
        say "scontrol requeue: ${answer:-no answer}"
        [[ $answer != *disabled* && $answer != *denied* ]] || break
        sleep 5
    done
    say "cannot be requeued by itself; submit it again to go on from the last checkpoint"
}

# broken: the node cannot run Python; another one may, so a few times this is SLURM's to mend
broken() {
    say "'${DISTKD_CONTAINER:-} $python' is no Python 3.11 on $(hostname): run make venv in $home where the nodes see it," \
        "or set DISTKD_PYTHON or DISTKD_CONTAINER (slurm/site.env.example)"
    hostname >>"$folder/broken"
    if (($(wc -l <"$folder/broken") <= ${DISTKD_MAX_FAILURES:-3})); then
        requeue
    fi
    exit 1
}

# meaning: of $code, in words
meaning() {
    case $code in
        0) echo "done" ;;
        2) echo "a mistake in config, data or arguments, named above" ;;
        3) echo "interrupted, the checkpoint is complete" ;;
        *) echo "a failure" ;;
    esac
}

# finish: requeue this job or leave it, with the code of the last step; does not return
finish() {
    local why again="" words=(--code "$code" --notes "$DISTKD_NOTES" --past "$folder/requeues.json")
    words+=(--max-failures "${DISTKD_MAX_FAILURES:-3}" --max-requeues "${DISTKD_MAX_REQUEUES:-100}")
    # interrupted, and not by this shell: some sites announce a pre-emption to the ranks alone
    [[ $code -ne 3 || -s $DISTKD_STOP_FILE ]] || warned=yes
    [[ -z $warned ]] || words+=(--warned)
    [[ -z $killed ]] || words+=(--killed)
    if [[ -n $overdue ]]; then
        say "the ranks did not stop in time: what they have done since the last checkpoint may be lost"
    else
        say "the ranks ended with code $code: $(meaning)"
    fi
    if [[ -z $killed ]] && given_up; then
        say "SLURM has requeued this job without being asked: it takes this node for dead"
        exit "$code"
    fi
    why=$("${container[@]}" "$python" -m distkd.slurm.requeue "${words[@]}") && again=yes
    say "$why"
    withdraw
    [[ -z $again ]] || requeue
    exit "$code"
}
