"""Commands that only print start without the heavy libraries."""

import subprocess
import sys

import pytest
from running import REPOSITORY, environment

HEAVY = {"peft", "datasets", "bitsandbytes", "tensorboard"}
PROGRAM = """
import sys
from lit_sft.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("imported", *sorted({heavy!r} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("args", [["fit", "--help"], ["fit", "--config", "demo", "--print_config"]], ids=" ".join)
def test_heavy_libraries_stay_out(args):
    program = PROGRAM.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", program, *args], cwd=REPOSITORY, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0 and "global_batch_size" in done.stdout, done.stderr
    assert done.stderr.splitlines()[-1].strip() == "imported", done.stderr.splitlines()[-1]
