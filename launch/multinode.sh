#!/usr/bin/env bash
# Several machines without a batch system: run it on each of them with the same arguments.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TEXT'
usage: MASTER_ADDR=HOST NODES=N NODE_RANK=I launch/multinode.sh [--print] CONFIG... [--section.field VALUE ...]

Run it on every node, with the same arguments and NODE_RANK 0 .. N-1. The nodes meet at MASTER_ADDR (torchrun). The run root must be on a file system that all nodes share. Whatever is not listed here goes to `distkd train`.

options:
  --print          print the torchrun command that this amounts to, and stop
  -h, --help       show this

environment:
  MASTER_ADDR      name or address of node 0 (required)
  NODES            number of nodes, or MIN:MAX to go on with fewer after a loss (required)
  NODE_RANK        0 on the node that MASTER_ADDR names, 1, 2, ... on the others (required)
  MASTER_PORT      free port there (default 29500)
  NPROC            ranks per node (default: one per GPU; without a GPU 1)
  LOCAL_ADDR       this node's address that the others reach (default: the one on the way to MASTER_ADDR)
  RENDEZVOUS       c10d (default), or static: ranks in the order of NODE_RANK, no restarts, for a batch system that
                   starts all nodes together and starts them again by itself
  RDZV_ID          name of the job, the same on all nodes (default distkd)
  MAX_RESTARTS     restarts of all ranks after a loss (default 3; with static none)
  LOG_DIR          folder for the output of each rank of this node, beside what is shown (default: shown only)
  GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME
                   network interface for CPU and for GPU collectives, for example eth0
exit code: 0 done, 2 error in config, data or arguments, 3 interrupted with a complete checkpoint, 1 anything else
example: MASTER_ADDR=node-a NODES=2 NODE_RANK=0 launch/multinode.sh configs/tiny/teacher.yaml --run.root /shared/runs
TEXT
}

print="" arguments=()
for argument in "$@"; do
    case $argument in
        --print) print=yes ;;
        -h | --help) usage && exit 0 ;;
        *) arguments+=("$argument") ;;
    esac
done
for name in MASTER_ADDR NODES NODE_RANK; do
    [[ -n ${!name:-} ]] || fail "$name is not set; see launch/multinode.sh --help"
done
[[ $NODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NODES is '$NODES', expected a number such as 2, or MIN:MAX such as 1:2"
[[ $NODE_RANK =~ ^[0-9]+$ && $NODE_RANK -lt ${NODES#*:} ]] || fail "NODE_RANK is '$NODE_RANK', expected 0 to $((${NODES#*:} - 1))"
rendezvous=${RENDEZVOUS:-c10d}
[[ $rendezvous == c10d || $rendezvous == static ]] || fail "RENDEZVOUS is '$rendezvous', expected c10d or static"
[[ $rendezvous == c10d || $NODES != *:* ]] || fail "NODES is '$NODES', but RENDEZVOUS=static needs one number; use c10d"
[[ ${#arguments[@]} -gt 0 ]] || fail "no config given; see launch/multinode.sh --help"

# a UDP socket finds the way to a host without sending anything
way_out='import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((sys.argv[1], 9)); print(s.getsockname()[0])'
address=${LOCAL_ADDR:-$("$python" -c "$way_out" "$MASTER_ADDR" 2>/dev/null)} ||
    fail "this node knows no way to MASTER_ADDR '$MASTER_ADDR'; check the name, or set LOCAL_ADDR"
if [[ -z ${GLOO_SOCKET_IFNAME:-} && $address != 127.* && $(getent hosts "$(hostname)" || true) =~ ^(127\.|::1) ]]; then
    echo "multinode.sh: hint: $(hostname) resolves to loopback here; CPU ranks meet only after" \
        "export GLOO_SOCKET_IFNAME=<the interface that has $address>; \`ip -brief address\` lists them" >&2
fi

nproc=${NPROC:-$(gpus)}
[[ $nproc -gt 0 ]] || nproc=1
endpoint=$MASTER_ADDR:${MASTER_PORT:-29500}
command=("${torchrun[@]}" --nnodes="$NODES" --nproc-per-node="$nproc" --local-addr="$address" --monitor-interval=1)
if [[ $rendezvous == static ]]; then
    command+=(--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${endpoint##*:}" --max-restarts=0)
else
    # is_host: where host names map to loopback, no node takes itself for the host
    conf=is_host=$((NODE_RANK == 0)),last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=3
    command+=(--rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="${RDZV_ID:-distkd}" --rdzv-conf="$conf"
        --max-restarts="${MAX_RESTARTS:-3}")
    # otherwise a node that joins again never hears of the new round: it waits 60 s and gives up
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
[[ -z ${LOG_DIR:-} ]] || command+=(--log-dir="$LOG_DIR" --tee=3 --role=rank)
command+=("$here/train.py" "${arguments[@]}")
if [[ -n $print ]]; then
    show ${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:+TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1} "${command[@]}"
    exit 0
fi
run_ranks "${command[@]}"
