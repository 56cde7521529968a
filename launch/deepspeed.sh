#!/usr/bin/env bash
# deepspeed.sh PROCESSES (PLAN.json | key=value ...): the ranks of one run on this machine, under the deepspeed command.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: deepspeed.sh PROCESSES (PLAN.json | key=value ...)" >&2; exit 2; }
processes=$1; shift
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
exec deepspeed --num_gpus "$processes" --master_port "$port" --module kit.worker "$@"
