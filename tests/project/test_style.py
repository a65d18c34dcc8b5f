"""The tools that read the code agree with it; their settings are in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MISSPELT = "rec" + "ieve"
TOOLS = {
    "lint": ["ruff", "check", "--no-cache"],
    "format": ["ruff", "format", "--check", "--no-cache"],
    "types": ["mypy"],
    "spelling": ["codespell_lib"],
}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_the_code_is_clean(tool):
    done = run(*TOOLS[tool])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("tool", "line", "finding"),
    [
        ("lint", "import os\n", "F401"),
        ("format", "x=1\n", "would be reformatted"),
        ("spelling", f"# a {MISSPELT} mistake\n", "==> receive"),
        ("types", "def f(number: int) -> str:\n    return number\n", "Incompatible return value"),
    ],
)
def test_the_test_can_fail(tool, line, finding, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(line)
    settings = REPOSITORY / "pyproject.toml"
    option = {"types": "--config-file", "spelling": "--toml"}.get(tool, "--config")
    done = run(*TOOLS[tool], option, settings, path)
    assert done.returncode != 0
    assert finding in done.stdout
