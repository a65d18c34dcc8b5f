"""The structure of the package: import-linter's contracts in pyproject.toml, and private attributes
in few files.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shape import is_private_touch

REPOSITORY = Path(__file__).parents[2]
ROOT = REPOSITORY / "lit_sft"
LINT_IMPORTS = (
    "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True))"
)


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT_IMPORTS], cwd=root, capture_output=True, text=True
    )


def test_imports_point_down():
    done = lint_imports(REPOSITORY)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("data/collate.py", "from lit_sft.model.loss import CausalLMLoss"),
        ("data/packing.py", "from lit_sft.data.sampler import StepOrder"),
        ("model/loss.py", "import lightning"),
        ("module.py", "def f():\n    from lit_sft.cli import main"),
        ("new_file.py", ""),
        ("data/new_file.py", ""),
    ],
)
def test_a_wrong_import_or_a_file_without_a_place_is_found(file, line, tmp_path):
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT, tmp_path / "lit_sft", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "lit_sft" / file
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert path.stem in done.stdout


def test_packages_have_no_code_of_their_own():
    """A package's `__init__.py` is its docstring; the top one has the version and the names of the
    Python API.
    """
    with_code = []
    for path in ROOT.rglob("*/__init__.py"):
        statements = ast.parse(path.read_text()).body
        if len(statements) != 1 or not isinstance(statements[0], ast.Expr):
            with_code.append(str(path.relative_to(ROOT)))
    assert with_code == []


PRIVATE = {
    "lightning_internals.py": "Lightning and jsonargparse",
    "callbacks/fail_together.py": "the store of torch's default process group",
    "model/attention/cpu_kernel.py": "torch's operations for attention on a CPU",
    "model/attention/implementation.py": "transformers' name of the attention in use",
    "model/fused_layers.py": "hooks of a module, which a fused step would skip",
    "model/lora/precision.py": "torch's cast that shards of a parameter follow",
    "model/parallel.py": "transformers' list of decoder blocks, torch's mark of a compiled block",
    "training/optim.py": "torch's multi-tensor product, and the mark of optimizers that unscale",
}
"""Files that touch private attributes of other libraries, and which. Each place says why."""


def test_private_attributes_of_others_stand_in_few_files():
    found = set()
    for path in ROOT.rglob("*.py"):
        if any(is_private_touch(node) for node in ast.walk(ast.parse(path.read_text()))):
            found.add(str(path.relative_to(ROOT)))
    assert found == set(PRIVATE)


@pytest.mark.parametrize(
    "line", ["trainer._checkpoint_connector", "from torch import _foreach_mul_", "f()._x"]
)
def test_a_private_attribute_is_found(line):
    assert any(is_private_touch(node) for node in ast.walk(ast.parse(line)))
