#!/usr/bin/env bash
# Prometheus for the runs of some run roots, on this machine alone.
set -euo pipefail
unset CDPATH # where it is exported, `cd` may go elsewhere, and says where
monitoring=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'TEXT'
usage: launch/monitoring/start.sh [--port N] [--data FOLDER] [--config FILE] RUN_ROOT...

Starts Prometheus in the foreground for all runs below these folders that train with `--metrics.export local` or
`network`, those of studies (RUN_ROOT/study/fold-1) and those that begin later included. Checks configuration and rules
first. Runs of one name are kept apart by their `job`: distkd, distkd/study, distkd-2 for a second RUN_ROOT. It listens
on 127.0.0.1 only and ends with Ctrl-C; what it has collected is kept for the next start.

options:
  --port N       where to listen (default 9090)
  --data FOLDER  where to keep what is collected, on a disk of this machine: Prometheus does not support network file
                 systems (default: ${XDG_STATE_HOME:-~/.local/state}/distkd/prometheus). Two at once need two folders
  --keep TIME    how long it is kept, such as 30d (default 90d)
  --config FILE  your copy of launch/monitoring/prometheus.yml, for an Alertmanager, passwords or more targets; what it
                 names without a / in front lies beside it
  --check        check configuration and rules, and stop
  -h, --help     show this

exit code: 0 ended as asked, 2 error in arguments, configuration or rules, 1 anything else
example: launch/monitoring/start.sh runs
TEXT
}

fail() {
    printf 'start.sh: %s\n' "$1" >&2
    exit "${2:-2}"
}

port=9090 data=${XDG_STATE_HOME:-${HOME:-}/.local/state}/distkd/prometheus keep=90d template=$monitoring/prometheus.yml
check="" roots=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --port | --data | --keep | --config)
            [[ -n ${2:-} ]] || fail "$1 needs a value; see launch/monitoring/start.sh --help"
            case $1 in
                --port) port=$2 ;;
                --data) data=$2 ;;
                --keep) keep=$2 ;;
                --config) template=$2 ;;
            esac
            shift 2
            ;;
        --port=* | --data=* | --keep=* | --config=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --check) check=yes && shift ;;
        -h | --help) usage && exit 0 ;;
        -*) fail "unknown option '$1'; see launch/monitoring/start.sh --help" ;;
        *) roots+=("$1") && shift ;;
    esac
done
[[ ${#roots[@]} -gt 0 ]] || fail "no run root given; for example: launch/monitoring/start.sh runs"
[[ $port =~ ^[1-9][0-9]{0,4}$ && $port -le 65535 ]] || fail "--port is '$port', expected 1 to 65535"
[[ $keep =~ ^[0-9]+[hdwy]$ ]] || fail "--keep is '$keep', expected a time such as 30d"
[[ -f $template ]] || fail "no file '$template' for --config"
for number in "${!roots[@]}"; do
    # a run makes its root, but a folder that is not there is rather a typing error
    [[ -d ${roots[number]} ]] || fail "no folder '${roots[number]}'; make it first if runs are to come"
    roots[number]=$(cd "${roots[number]}" && pwd)
    case ${roots[number]} in
        *[\*$'\n']*) fail "run root '${roots[number]}' has a * or a line break in its name, which Prometheus cannot watch" ;;
    esac
done
for program in prometheus promtool; do
    command -v "$program" >/dev/null ||
        fail "no $program in PATH; Debian and Ubuntu: sudo apt-get install prometheus, others: https://prometheus.io/download" 1
done

# quoted TEXT: as a single-quoted scalar of YAML
quoted() {
    printf "'%s'" "${1//\'/\'\'}"
}

# folders: a line for each folder of target files, its job, a tab, its pattern. A * of Prometheus stands for files and not
# for folders, so studies are looked for here; a folder that was found stays, its files come and go. `[`, `?` and `\` are
# themselves. Rules go by job and run, so each folder is a job of its own. Its name comes from roots and folders alone:
# with another name after the next start series would begin anew, and the run of the old name would seem to be gone.
folders() {
    local number name root folder study files
    local -A own=() seen=()
    for root in "${roots[@]}"; do own[$root]=yes; done
    shopt -s nullglob
    for number in "${!roots[@]}"; do
        root=${roots[number]} name=$job
        if [[ $number -gt 0 ]]; then name+=-$((number + 1)); fi
        for folder in "$root/prometheus" "$root"/*/prometheus "$root"/*/*/prometheus "$root"/*/*/*/prometheus; do
            files=("$folder"/*.rank-*.json)
            folder=${folder%/prometheus} study=${folder#"$root"}
            # a root that was named twice, or lies below another one, is one job
            if [[ -n ${seen[$folder]:-} || (-n $study && -n ${own[$folder]:-}) ]]; then continue; fi
            if [[ -n $study && (${#files[@]} -eq 0 || $study == *[\*$'\n\t']*) ]]; then continue; fi
            seen[$folder]=yes
            folder=${folder//\\/\\\\} folder=${folder//\[/\\[} folder=${folder//\?/\\?}
            printf '%s\t%s/prometheus/*.rank-*.json\n' "$name$study" "$folder"
        done
    done
    shopt -u nullglob
}

# render: the template with a copy of its job for each of these folders, and with its rules where they are, as $1
render() {
    local line line_of_job rules name pattern copied="" block=()
    rules=$(cd "$(dirname "$template")" && pwd)
    while IFS= read -r line || [[ -n $line ]]; do
        if [[ ${#block[@]} -gt 0 && ($line =~ ^[^\ #] || $line == "$indent- "*) ]]; then copies; fi
        if [[ -z $copied && $line =~ $heading ]]; then
            block=("$line")
        elif [[ ${#block[@]} -gt 0 ]]; then
            block+=("$line")
        elif [[ $line =~ ^\ +-\ (rules/[a-z*_]+\.yml)$ ]]; then
            printf '  - %s\n' "$(quoted "$rules/${BASH_REMATCH[1]}")"
        else
            printf '%s\n' "$line"
        fi
    done <"$template" >"$1"
    if [[ ${#block[@]} -gt 0 ]]; then copies >>"$1"; fi
}

# copies: the lines of `block`; those of the job that watches run roots once for each folder. A part of render
copies() {
    if [[ ${block[*]} != *"$mark"* ]]; then
        printf '%s\n' "${block[@]}"
    else
        copied=yes
        while IFS=$'\t' read -r name pattern; do
            for line_of_job in "${block[@]}"; do
                if [[ $line_of_job =~ $heading ]]; then
                    printf '%s- job_name: %s\n' "$indent" "$(quoted "$name")"
                elif [[ $line_of_job == *"$mark"* ]]; then
                    printf '          - %s\n' "$(quoted "$pattern")"
                else
                    printf '%s\n' "$line_of_job"
                fi
            done
        done <"$known"
    fi
    block=()
}

# look: keep what was found before beside what is found now; succeeds where something is new
look() {
    { [[ ! -f $known ]] || cat "$known"; folders; } | sort -u >"$known.new"
    if [[ -f $known ]] && cmp -s "$known" "$known.new"; then
        rm "$known.new"
        return 1
    fi
    mv "$known.new" "$known"
}

# checked COMMAND...: run a check; what it says is shown where it fails
checked() {
    local said
    said=$("$@" 2>&1) || fail "${*: -1} is refused:"$'\n'"$said"
}

mark='# start.sh puts its run roots here' heading='^( +)- job_name: *["'\'']?([A-Za-z0-9_-]+)' indent="" job=""
while IFS= read -r line && [[ $line != *"$mark"* ]]; do
    if [[ $line =~ $heading ]]; then indent=${BASH_REMATCH[1]} job=${BASH_REMATCH[2]}; fi
done <"$template"
[[ $line == *"$mark"* && -n $job ]] ||
    fail "$template has no job with a line that ends with '$mark'; take it from launch/monitoring/prometheus.yml"
[[ $job == distkd* ]] || fail "the job '$job' of $template is none that rules take, expected a name that begins with distkd"
notes=$(mktemp -d)
server="" pause=""
# shellcheck disable=SC2317,SC2329  # called by the trap
leave() {
    trap : TERM INT HUP
    if [[ -n $pause ]]; then kill "$pause" 2>/dev/null || true; fi
    if [[ -n $server ]]; then kill -TERM "$server" 2>/dev/null || true; fi
    rm -rf "$notes"
}
trap leave EXIT
known=$notes/.folders config=$notes/.prometheus.yml
if [[ $template != "$monitoring/prometheus.yml" ]]; then
    # files of a password, of rules or of more targets, which it may name as lying beside it
    beside=$(cd "$(dirname "$template")" && pwd)
    for file in "$beside"/*; do [[ ! -e $file ]] || ln -s "$file" "$notes/"; done
fi
look
render "$config"
# rules first: by way of the configuration not every error in an expression is found, nor its file named
while IFS= read -r rules; do checked promtool check rules "$rules"; done \
    < <(sed -n "s/^ *- '\(.*\/rules\/[a-z_]*\.yml\)'$/\1/p" "$config" | sed "s/''/'/g")
checked promtool check config "$config"
if [[ -n $check ]]; then
    echo "configuration and rules are well"
    exit 0
fi

for root in "${roots[@]}"; do
    # ranks make it, too; Prometheus complains about a folder that it cannot watch
    mkdir -p "$root/prometheus" 2>/dev/null || true
done
if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    fail "port $port is taken, perhaps by another Prometheus; --port takes another one" 1
fi
mkdir -p "$data" 2>/dev/null || fail "cannot make the folder '$data'; --data takes another one" 1
[[ -w $data ]] || fail "cannot write to '$data'; --data takes another folder" 1
# Debian's Prometheus does not lock its data; the server inherits the lock and holds it as long as it lives
if command -v flock >/dev/null; then
    exec 9>"$data/.distkd.lock"
    flock -n 9 || fail "another Prometheus keeps its data in '$data'; --data takes another folder" 1
fi
case $(stat -f -c %T "$data" 2>/dev/null || true) in
    nfs | nfs4 | lustre | gpfs | beegfs | smb* | cifs | ceph | fuse*)
        echo "start.sh: '$data' is on a network file system, where Prometheus may lose data; --data takes a local folder" >&2
        ;;
esac

stop=""
trap 'stop=yes' TERM INT HUP
prometheus --config.file="$config" --storage.tsdb.path="$data" --storage.tsdb.retention.time="$keep" \
    --web.listen-address="127.0.0.1:$port" --log.level=warn &
server=$!

# answers: whether the server has read its data and begun
answers() {
    local status=""
    { exec 3<>"/dev/tcp/127.0.0.1/$port"; } 2>/dev/null || return 1
    printf 'GET /-/ready HTTP/1.0\r\n\r\n' >&3
    IFS= read -r status <&3 || true
    exec 3>&-
    [[ $status == *" 200 "* ]]
}

# rest SECONDS: until then, or until a signal comes
rest() {
    sleep "$1" 9>&- &
    pause=$!
    wait "$pause" || true
    kill "$pause" 2>/dev/null || true
    pause=""
}

said=""
while [[ -z $stop ]] && kill -0 "$server" 2>/dev/null; do
    if [[ -z $said ]]; then
        if answers; then
            said=yes
            cat <<TEXT
Prometheus watches ${roots[*]}
  graphs and queries  http://127.0.0.1:$port/graph?g0.expr=run:distkd_samples:rate1m&g0.tab=0
  alerts              http://127.0.0.1:$port/alerts
  ranks found         http://127.0.0.1:$port/targets
  data                $data (kept for $keep)
Train with --metrics.export local (network where ranks are on other machines). From another machine: ssh -L $port:127.0.0.1:$port $HOSTNAME
Dashboards: launch/monitoring/grafana, data source http://127.0.0.1:$port. Ctrl-C ends it.
TEXT
        fi
        rest 0.2
        continue
    fi
    rest "${DISTKD_LOOK_EVERY_S:-15}"
    if [[ -z $stop ]] && look; then
        render "$config.new"
        mv "$config.new" "$config"
        kill -HUP "$server" 2>/dev/null || true
    fi
done
if [[ -n $stop ]]; then kill -TERM "$server" 2>/dev/null || true; fi
code=0
while kill -0 "$server" 2>/dev/null; do wait "$server" || code=$?; done
wait "$server" 2>/dev/null || code=$?
server=""
if [[ -n $stop ]]; then exit 0; fi
fail "Prometheus ended by itself with $code; what it said is above" 1
