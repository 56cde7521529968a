#!/usr/bin/env bash
# torchrun_nodes.sh NODES NODE_RANK MASTER_ADDR MASTER_PORT PROCESSES (PLAN.json | key=value ...): the ranks of this node, under torchrun.
set -euo pipefail
[ $# -ge 6 ] || { echo "usage: torchrun_nodes.sh NODES NODE_RANK MASTER_ADDR MASTER_PORT PROCESSES (PLAN.json | key=value ...)" >&2; exit 2; }
nodes=$1 rank=$2 address=$3 port=$4 processes=$5; shift 5
exec torchrun --nnodes "$nodes" --node_rank "$rank" --nproc_per_node "$processes" --master_addr "$address" --master_port "$port" \
  --module kit.worker "$@"
