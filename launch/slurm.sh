#!/usr/bin/env bash
# A run on Slurm nodes, a process for each GPU:
#   sbatch launch/slurm.sh run.yaml
# The configuration and its output lie on a file system that all nodes share. A job whose process is
# lost (exit code 75) goes back into the queue and on from its last checkpoint.
#SBATCH --job-name=jaxlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

config=${1:?give a configuration}
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  jaxlm finetune "$config" --distributed=auto --mesh=data=-1 --compile-cache="$HOME/.cache/jaxlm"
code=$?
# 128 and above: a signal ended a task, such as that of a node that went.
if { [ "$code" -eq 75 ] || [ "$code" -ge 128 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
