"""Set before torch is imported: tiny models run fastest on one thread, and ranks share the machine's cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[name]  # a test that wants a cluster says so
