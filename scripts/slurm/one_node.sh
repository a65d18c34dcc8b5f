#!/usr/bin/env bash
# One node, one task per GPU:  sbatch scripts/slurm/one_node.sh CONFIG [--key value ...]
# Options of sbatch before the script's name win over those below. The environment you submit from is used.
#SBATCH --job-name=lit_sft
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append          # a requeued job goes on with its log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8         # as many as GPUs; never --ntasks alone
#SBATCH --gpus-per-node=8           # not --gpus-per-task: every task sees all GPUs of its node
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300           # so many seconds before the end: longer than a step and a save; without `B:`
set -euo pipefail
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from sbatch any more

# --kill-on-bad-exit: a rank that died ends the others at once
srun --kill-on-bad-exit=1 python -m lit_sft fit --config "$1" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp "${@:2}"
