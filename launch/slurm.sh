#!/usr/bin/env bash
# Train on Slurm, from the root of the repository, with its virtual environment active:
#
#   sbatch launch/slurm.sh                                   # the quickstart, to see that everything is in place
#   sbatch --nodes 16 launch/slurm.sh my_config.py --steps 100000
#
# One task a node, which drives all its GPUs: one reader of data, one copy of the program in host memory and one
# process to signal, the same layout as a pod on Kubernetes or a TPU host. (One task a GPU also works, with
# --ntasks-per-node 8: each then takes the GPU of its local rank.)
#
#SBATCH --job-name=lens
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# After a node failed or the job was pre-empted it is queued again, under the same number and into the same log.
#SBATCH --requeue
# Five minutes before the time is up, SIGTERM to the tasks (not to this shell): the trainer saves and leaves with 143.
#SBATCH --signal=TERM@300
set -euo pipefail

config=${1:-quickstart}
[[ $# -gt 0 ]] && shift
# Folders that all nodes see.
out=${LENS_OUT:-runs/$(basename "$config" .py)}
data=${LENS_DATA:-data/openmoji}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/compiled}

# Slurm signals the tasks itself. A trap instead of the default keeps this shell alive to see how they ended; it must
# forward nothing, since a second SIGTERM tells the trainer to leave without saving.
trap : TERM

# --kill-on-bad-exit=0 and --wait: tasks leave one after the other when they save, so the first must not end the rest.
code=0
srun --kill-on-bad-exit=0 --wait=300 \
  launch/with_flags.sh gpu \
  lens-jax train "$config" --out "$out" --data.path "$data" "$@" || code=$?

# 143: stopped by SIGTERM and saved. Goes on from there in its next turn. (An error is not tried again, and neither is
# 130: `scancel --signal=INT JOB` saves and stops for good.)
if [[ $code -eq 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
