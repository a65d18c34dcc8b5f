"""The rank of this process, and a broadcast from rank 0.

The top of the file imports the standard library only: `signals` needs it before torch is imported.
"""

from __future__ import annotations

import os
from typing import Any


def global_rank() -> int:
    """Returns the global rank from the environment, before a process group exists.

    If Lightning starts the ranks on several nodes, the result only says whether this is rank 0: it
    is 0 for rank 0 and positive for the others.
    """
    # In an interactive SLURM shell all ranks inherit the shell's SLURM_PROCID.
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
