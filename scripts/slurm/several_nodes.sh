#!/usr/bin/env bash
# Several nodes, the model sharded over all GPUs:
#   sbatch --nodes 4 scripts/slurm/several_nodes.sh CONFIG [--key value ...]
# one_node.sh explains the options. Data cache and output must lie on a file system that all nodes share.
#SBATCH --job-name=lit_sft
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
set -euo pipefail
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Ranks meet on the first node, at port 15000 plus the last digits of the job id. Set MASTER_PORT to use another port.
srun --kill-on-bad-exit=1 python -m lit_sft fit --config "$1" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy fsdp2 "${@:2}"
