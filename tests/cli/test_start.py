"""What only prints starts without the heavy libraries."""

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


@pytest.mark.parametrize(
    "args", [["fit", "--help"], ["fit", "--config", "demo", "--print_config"]], ids=" ".join
)
def test_heavy_libraries_stay_out(args):
    program = PROGRAM.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0 and "global_batch_size" in done.stdout, done.stderr
    assert done.stderr.splitlines()[-1].strip() == "imported", done.stderr.splitlines()[-1]


LIGHT = """
import sys
from lit_sft.__main__ import main
try:
    main()
except SystemExit:
    pass
print("imported", *sorted({heavy!r} & set(sys.modules)), file=sys.stderr)
"""


def python(program, *args):
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1].strip()


@pytest.mark.parametrize("args", [[], ["--help"], ["--version"], ["pedict"]], ids=str)
def test_the_front_door_is_light(args):
    program = LIGHT.format(
        heavy={"torch", "lightning", "transformers", "numpy", "yaml", "jsonargparse"}
    )
    assert python(program, *args) == "imported"


def test_the_package_is_light_until_a_class_is_asked_for():
    program = """
import sys
import lit_sft
early = "torch" in sys.modules
from lit_sft import SFTDataModule, SFTModule, SFTTrainer
assert [c.__name__ for c in (SFTDataModule, SFTModule, SFTTrainer)] == ["SFTDataModule", "SFTModule", "SFTTrainer"]
assert set(lit_sft.__all__) == {"SFTDataModule", "SFTModule", "SFTTrainer", "__version__"}
print(early, "torch" in sys.modules, hasattr(lit_sft, "SFTTrianer"), file=sys.stderr)
"""
    assert python(program) == "False True False"
