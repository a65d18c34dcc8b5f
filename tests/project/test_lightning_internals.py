"""Private parts of Lightning behave as `lightning_internals` expects."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lit_sft.lightning_internals import kill_launched_ranks


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
