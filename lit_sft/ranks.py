"""Which rank this process is, and how rank 0 tells the others.

The top of the file imports the standard library only: `signals` needs it before torch is imported.
"""

from __future__ import annotations

import os
from typing import Any


def global_rank() -> int:
    """This process's rank before a process group exists, as launchers put it into the environment.
    Where Lightning starts the ranks of several nodes, only whether it is the first.
    """
    # Whose SLURM_PROCID all ranks inherit.
    in_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    for variable in ("RANK",) if in_shell else ("RANK", "SLURM_PROCID"):
        if variable in os.environ:
            return int(os.environ[variable])
    return max(int(os.environ.get(variable, 0)) for variable in ("LOCAL_RANK", "NODE_RANK"))


def broadcast_from_rank_zero(value: Any) -> Any:
    """Returns the value of rank 0 on every rank. A collective call; the value must be picklable."""
    from torch import distributed

    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]
