"""An environment of its own for TRL, which is never a dependency: made on first use, shared by all comparisons."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

VENV = Path("~/.cache/lit_sft/trl-venv")
REQUIREMENTS = ("torch==2.13.0", "trl==1.16.*", "peft")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def trl_python(venv: Path = VENV) -> str:
    """The interpreter of an environment that has TRL; the environment is made if it is not there."""
    venv = venv.expanduser()
    python = venv / "bin" / "python"
    if python.exists() and subprocess.run([python, "-c", "import trl, peft"], capture_output=True).returncode == 0:
        return str(python)
    print(f"installing TRL into {venv}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    torch, *others = REQUIREMENTS
    attempts = [[torch]]
    if sys.platform == "linux" and shutil.which("nvidia-smi") is None:  # without the gigabytes of CUDA
        attempts = [[f"{torch}+cpu"], ["--index-url", TORCH_CPU_INDEX, torch]]
    if all(subprocess.run([*install, *attempt]).returncode for attempt in attempts):
        sys.exit(f"error: {torch} cannot be installed into {venv}; is a package index within reach?")
    if subprocess.run([*install, *others]).returncode:
        sys.exit(f"error: {' '.join(others)} cannot be installed into {venv}; is a package index within reach?")
    return str(python)
