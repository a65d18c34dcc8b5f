"""Set before torch is imported: tiny models run fastest on one thread, and ranks share the machine's cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[name]  # a test that wants a cluster says so

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A run of one rank under `fsdp2` opens one in this process; the next test would wait for others in it."""
    yield
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
