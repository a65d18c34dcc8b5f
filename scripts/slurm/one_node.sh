#!/usr/bin/env bash
# One node, one task per GPU:  sbatch scripts/slurm/one_node.sh CONFIG [--key value ...]
# Options of sbatch before the script's name win over those below. The job uses the environment you submit from.
#SBATCH --job-name=lit_sft
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append          # a requeued job appends to its log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8         # the number of GPUs; never --ntasks alone
#SBATCH --gpus-per-node=8           # not --gpus-per-task: every task sees all GPUs of its node
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300           # seconds before the end: more than a step and a save; without `B:`
set -euo pipefail
# srun does not inherit --cpus-per-task from sbatch.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# --kill-on-bad-exit: if one rank dies, the others end at once.
srun --kill-on-bad-exit=1 python -m lit_sft fit --config "$1" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp "${@:2}"
