"""The tools that read the code agree with it; their settings are in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
TOOLS = {
    "lint": ["ruff", "check", "--no-cache"],
    "format": ["ruff", "format", "--check", "--no-cache"],
    "types": ["mypy"],
}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_code_is_clean(tool):
    done = run(*TOOLS[tool])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("tool", "line"),
    [
        ("lint", "import os\n"),
        ("format", "x=1\n"),
        ("types", "def f(number: int) -> str:\n    return number\n"),
    ],
)
def test_the_test_can_fail(tool, line, tmp_path):
    path = tmp_path / "lit_sft" / "module.py"
    path.parent.mkdir()
    path.write_text(line)
    done = run(*TOOLS[tool], "--config-file" if tool == "types" else "--config", REPOSITORY / "pyproject.toml", path)
    assert done.returncode != 0
    assert "module.py" in done.stdout
