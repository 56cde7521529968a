#!/bin/bash
# sbatch [options] slurm.sh RUN: one frozen run as a batch job of your own making, for sites whose jobs need more than
# launch.slurm.* can say. RUN is a directory made by `kit compose`, `kit train` or `kit train launch=slurm`.
# A job that is near its end saves, is queued again, and goes on from its newest complete checkpoint.
#SBATCH --job-name=kit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
run=${1:?usage: sbatch slurm.sh RUN}
asked=no
trap 'asked=yes; kill -USR1 "$step"' USR1
trap : TERM
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none "${PYTHON:-python3}" -m kit launch-node "$run" --resume newest &
step=$!
wait "$step"; while kill -0 "$step" 2>/dev/null; do wait "$step"; done; wait "$step"; code=$?
if [ "$asked" = yes ] && [ "$code" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${REQUEUES:-10}" ]; then
  trap - TERM
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$code"
