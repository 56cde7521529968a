#!/bin/bash
# qsub -v RUN=/path/of/run [-l select=2:ngpus=8:ncpus=64:mpiprocs=1] pbs.sh: one frozen run under PBS, a task to each node.
# Submitted again after it was stopped, it goes on from the newest complete checkpoint.
#PBS -N kit
#PBS -l walltime=12:00:00
#PBS -r y
: "${RUN:?usage: qsub -v RUN=/path/of/run pbs.sh}"
mapfile -t nodes < <(awk '!seen[$0]++' "$PBS_NODEFILE")
job=${PBS_JOBID%%[!0-9]*}
for rank in "${!nodes[@]}"; do
  # pbsdsh starts a task without this environment, so the words carry it.
  pbsdsh -n "$rank" -- /usr/bin/env "PATH=$PATH" "PYTHONPATH=$PYTHONPATH" "NNODES=${#nodes[@]}" "NODE_RANK=$rank" \
    "MASTER_ADDR=${nodes[0]}" "MASTER_PORT=$((20000 + job % 10000))" \
    "${PYTHON:-python3}" -m kit launch-node "$RUN" --resume newest &
  tasks[rank]=$!
done
trap 'kill -TERM "${tasks[@]}" 2>/dev/null' TERM USR1
code=0
for task in "${tasks[@]}"; do
  wait "$task"; while kill -0 "$task" 2>/dev/null; do wait "$task"; done
  wait "$task" || code=$?
done
exit "$code"
