#!/usr/bin/env bash
# deepspeed_hostfile.sh HOSTFILE (run.yaml | key=value ...): one run on all nodes of a hostfile, reached with ssh (pdsh).
set -euo pipefail
hostfile=${1:?usage: deepspeed_hostfile.sh HOSTFILE (run.yaml | key=value ...)}; shift
exec kit train "$@" launch=deepspeed launch.hostfile="$hostfile"
