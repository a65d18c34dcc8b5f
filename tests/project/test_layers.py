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


WRONG = {
    # Another stage; a later file of the folder; Lightning below the files that connect to it; the
    # command line, in a function; files that no list names.
    "data/collate.py": "from lit_sft.model.loss import CausalLMLoss",
    "data/packing.py": "from lit_sft.data.sampler import StepOrder",
    "model/loss.py": "import lightning",
    "module.py": "def f():\n    from lit_sft.cli import main",
    "new_file.py": "",
    "data/new_file.py": "",
}


@pytest.fixture(scope="module")
def said_of_wrong_lines(tmp_path_factory):
    """What import-linter says of a copy of the package with all wrong lines."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    shutil.copytree(ROOT, folder / "lit_sft", ignore=shutil.ignore_patterns("__pycache__"))
    for file, line in WRONG.items():
        with (folder / "lit_sft" / file).open("a") as code:
            code.write(f"\n{line}\n")
    done = lint_imports(folder)
    assert done.returncode != 0
    return done.stdout


@pytest.mark.parametrize(
    "found",
    [
        "The folder data/\n----------------\n\n"
        "lit_sft.data.packing is not allowed to import lit_sft.data.sampler:",
        "lit_sft.data is not allowed to import lit_sft.model:",
        "lit_sft.model is not allowed to import lightning:",
        "lit_sft.module is not allowed to import lit_sft.cli:",
        "The following modules are not listed as layers:\n\n- lit_sft.new_file\n",
        "The following modules are not listed as layers:\n\n- lit_sft.data.new_file\n",
    ],
)
def test_a_wrong_import_or_a_file_without_a_place_is_found(found, said_of_wrong_lines):
    assert found in said_of_wrong_lines


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
    # The store of the default process group.
    "callbacks/fail_together.py": {"_get_default_store"},
    # Attention on a CPU, forward and backward.
    "model/attention/cpu_kernel.py": {
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    },
    # The name of the attention in use.
    "model/attention/implementation.py": {"_attn_implementation"},
    # The mark of a generation config that transformers 4 would make anew from config.json.
    "model/export.py": {"_from_model_config"},
    # Blocks of FP8, which transformers reads wrongly unless they are whole.
    "model/dequantize.py": {"_dequantize_one"},
    # What computes the gate of experts, and the grouped product in every version of torch.
    "model/experts.py": {"_apply_gate", "_grouped_linear"},
    # Hooks of a module, which a fused step would skip.
    "model/fused_layers.py": {"_forward_hooks"},
    # The cast that shards of a parameter follow.
    "model/lora/precision.py": {"_apply"},
    # The classes of decoder blocks; the mark of a compiled block.
    "model/parallel.py": {"_compiled_call_impl", "_no_split_modules"},
    # The multi-tensor product.
    "training/optim.py": {"_foreach_mul_"},
}
"""Private names of torch and transformers by file. Those of Lightning and jsonargparse stand in
`lightning_internals.py` only. Each place says why.
"""


def private_names(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not is_private_touch(node):
            continue
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        else:
            names |= {alias.name for alias in node.names if alias.name.startswith("_")}
    return names


def test_private_attributes_of_others_stand_in_few_places():
    found = {str(path.relative_to(ROOT)): private_names(path) for path in ROOT.rglob("*.py")}
    assert len(found.pop("lightning_internals.py")) > 10
    assert {path: names for path, names in found.items() if names} == PRIVATE


@pytest.mark.parametrize(
    "line", ["trainer._checkpoint_connector", "from torch import _foreach_mul_", "f()._x"]
)
def test_a_private_attribute_is_found(line):
    assert any(is_private_touch(node) for node in ast.walk(ast.parse(line)))
