#!/usr/bin/env bash
# torchrun.sh PROCESSES (PLAN.json | key=value ...): the ranks of one run on this machine, under torchrun.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: torchrun.sh PROCESSES (PLAN.json | key=value ...)" >&2; exit 2; }
processes=$1; shift
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
exec torchrun --nproc_per_node "$processes" --nnodes 1 --master_addr 127.0.0.1 --master_port "$port" --module kit.worker "$@"
