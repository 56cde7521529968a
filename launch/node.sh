#!/usr/bin/env bash
# node.sh PLAN.json NODE_RANK MASTER_ADDR MASTER_PORT: the ranks of this node of a frozen run, which goes on if it was stopped.
set -euo pipefail
[ $# -eq 4 ] || { echo "usage: node.sh PLAN.json NODE_RANK MASTER_ADDR MASTER_PORT" >&2; exit 2; }
exec kit launch-node "$1" --node-rank "$2" --master-addr "$3" --master-port "$4" --resume newest
