#!/usr/bin/env bash
# node.sh PLAN.json NODE_RANK MASTER_ADDR MASTER_PORT: the ranks of this node of a frozen run, which goes on if it was stopped.
set -euo pipefail
plan=${1:?usage: node.sh PLAN.json NODE_RANK MASTER_ADDR MASTER_PORT}
exec kit launch-node "$plan" --node-rank "${2:?NODE_RANK}" --master-addr "${3:?MASTER_ADDR}" --master-port "${4:?MASTER_PORT}" \
  --resume newest
