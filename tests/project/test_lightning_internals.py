"""What Lightning keeps to itself: touched in one file, and there as Lightning means it."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lit_sft.lightning_internals import kill_launched_ranks

ROOT = Path(__file__).parents[2] / "lit_sft"
ROOMS = ("callbacks", "checkpoint", "commands", "datamodule.py", "distributed", "run", "trainer.py")
"""Where objects are Lightning's or our own."""
NOT_PRIVATE = ("_exit", "_replace")
"""Of `os` and of named tuples: documented, in spite of the underscore."""


def private_touches(path: Path) -> list[str]:
    """Private attributes of objects other than `self`, and private names that are imported from
    Lightning.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
        if (
            not isinstance(node, ast.Attribute)
            or not node.attr.startswith("_")
            or node.attr.startswith("__")
        ):
            continue
        if (
            ast.unparse(node.value) not in ("self", "cls", "super()")
            and node.attr not in NOT_PRIVATE
        ):
            found.append(ast.unparse(node))
    return found


def test_private_attributes_are_touched_in_one_file():
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    files += [ROOT / room for room in ROOMS if room.endswith(".py")]
    assert len(files) > 25
    assert {str(file): found for file in files if (found := private_touches(file))} == {}
    assert len(private_touches(ROOT / "lightning_internals.py")) > 10, "the test can fail"


@pytest.fixture
def processes():
    """One that stands for this one, and one that it has launched."""
    made = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)
    ]
    yield made
    for process in made:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", ["ours", "as it would be"])
def test_launched_ranks_are_killed_alone(how, processes):
    """Lightning's observer of processes kills the one that launched them, unless their list is
    empty by then.
    """
    main, child = processes
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    launcher.procs = [child]
    observer = _ChildProcessObserver(
        main_pid=main.pid, child_processes=launcher.procs, sleep_period=1
    )
    if how == "ours":
        kill_launched_ranks(SimpleNamespace(launcher=launcher))
    else:
        child.kill()
    assert child.wait(timeout=10) != 0
    observer.start()
    observer.join(timeout=10)
    assert not observer.is_alive()
    if how == "ours":
        assert main.poll() is None
    else:
        assert main.wait(timeout=10) != 0


def test_ranks_that_others_have_launched_are_left_alone():
    kill_launched_ranks(SimpleNamespace(launcher=None))
