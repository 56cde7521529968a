#!/bin/bash
# qsub -v RUN=/path/of/run [-l select=2:ngpus=8:ncpus=64:mpiprocs=1] pbs.sh: one frozen run under PBS, a task to each node.
# Submitted again after it was stopped, it goes on from the newest complete checkpoint.
#PBS -N kit
#PBS -l walltime=12:00:00
#PBS -r y
: "${RUN:?usage: qsub -v RUN=/path/of/run pbs.sh}"
: "${PBS_NODEFILE:?this is a job of PBS: qsub -v RUN=/path/of/run pbs.sh}"
# The first line of each node, as pbsdsh counts the lines.
mapfile -t lines < <(awk '!seen[$0]++ {print NR - 1, $0}' "$PBS_NODEFILE")
[ ${#lines[@]} -gt 0 ] || { echo "pbs.sh: $PBS_NODEFILE names no node" >&2; exit 3; }
job=${PBS_JOBID%%[!0-9]*}
for rank in "${!lines[@]}"; do
  # pbsdsh starts a task without this environment, so the words carry it.
  pbsdsh -n "${lines[rank]%% *}" -- /usr/bin/env "PATH=$PATH" "PYTHONPATH=$PYTHONPATH" "NNODES=${#lines[@]}" "NODE_RANK=$rank" \
    "MASTER_ADDR=${lines[0]#* }" "MASTER_PORT=$((20000 + job % 10000))" \
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
