#!/usr/bin/env bash
# One recipe with several seeds, on a partition where jobs may be preempted. Each requeued job resumes its own run:
#   sbatch --partition PREEMPTIBLE --array 1-5 scripts/slurm/array.sh CONFIG [--key value ...]
# one_node.sh explains the options.
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

# Without grace time a preempted job is killed at once and loses the minutes since the last checkpoint. There is no
# --ckpt_path, because a requeued job finds its own run. `resume.max_restarts` limits the number of restarts.
srun --kill-on-bad-exit=1 python -m lit_sft fit --config "$1" \
    --trainer.devices 1 --seed_everything "$SLURM_ARRAY_TASK_ID" --checkpoint.every_n_minutes 10 "${@:2}"
