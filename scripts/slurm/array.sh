#!/usr/bin/env bash
# The same recipe with several seeds, where jobs may be preempted at any time; each goes on by itself when it is its turn:
#   sbatch --partition PREEMPTIBLE --array 1-5 scripts/slurm/array.sh CONFIG [--key value ...]
# What the options mean is said in one_node.sh.
#SBATCH --job-name=lit_sft
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --array=1-3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
set -euo pipefail
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# A partition without grace time kills at once: what is lost then are the minutes since the last checkpoint. No
# --ckpt_path: a job that is started again finds its own run. `resume.max_restarts` bounds how often.
srun --kill-on-bad-exit=1 python -m lit_sft fit --config "$1" \
    --trainer.devices 1 --seed_everything "$SLURM_ARRAY_TASK_ID" --checkpoint.every_n_minutes 10 "${@:2}"
