"""Set before torch is imported: tiny models run fastest on one thread, and ranks share the
machine's cores.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[name]  # a test that wants a cluster says so

import pytest  # noqa: E402

# No test cuts the power, and what a killed process has written stays. A run waits for the disk 30
# times otherwise.
os.fsync = lambda descriptor: None

OF_A_RANK = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A run of one rank under `fsdp2` opens one in this process; the next test would wait for
    others in it.

    Lightning also leaves LOCAL_RANK in the environment; a launcher that inherits it starts no other
    rank and waits. And a run that took itself for rank 1 leaves that number, with which later runs
    say nothing.
    """
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    before, rank = (
        {name: os.environ.get(name) for name in OF_A_RANK},
        getattr(rank_zero_only, "rank", None),
    )
    yield
    rank_zero_only.rank = rank
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
