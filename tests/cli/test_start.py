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


AS_ON_WINDOWS = """
import os, select, signal, sys, threading
sys.path[:0] = [{tests!r}]
missing = {{
    signal: ("SIGUSR1", "SIGUSR2", "SIGKILL", "pthread_sigmask", "sigwaitinfo", "set_wakeup_fd"),
    os: ("register_at_fork",),
    select: ("select",),
}}
taken = {{}}
for module, names in missing.items():
    for name in names:
        taken[module, name] = getattr(module, name)
        delattr(module, name)
sys.platform = "win32"
from lit_sft import __main__, signals
sys.platform = "linux"
assert len(signals.SIGNALS) == 2
if sys.argv[1] == "fit":
    signals.install()
    signals.shield_worker()
    # Other libraries have code of their own for Windows.
    for (module, name), value in taken.items():
        if module is not signal or name == "SIGKILL":
            setattr(module, name, value)
__main__.main()
"""


def test_where_names_of_unix_are_missing(tmp_path):
    """Simulated on Linux: no run of it on Windows."""
    program = AS_ON_WINDOWS.format(tests=str(REPOSITORY / "tests"))
    args = ["--config", "demo", "--trainer.max_steps=1", "--data.max_samples=16"]
    args += ["--data.questions=[]", f"--trainer.default_root_dir={tmp_path}"]
    for command in (["--help"], ["fit", *args]):
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment(),
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "lightning_logs" / "version_0" / "hf" / "model.safetensors").is_file()
