"""The house: every file has a rank, and imports only point down. Function-local imports count too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lit_sft"
RANK = {
    "types": 0, "interrupts": 0,
    "data": 1, "model": 1, "optim": 1, "metrics": 1, "seeding": 1, "flops": 1, "demo": 1,
    "display": 2, "failures": 2, "links": 2, "locking": 2, "prepare": 2, "prompts": 2, "build": 2, "resuming": 2,
    "dataset": 3, "answering": 3, "evaluation": 4,
    "module": 5, "datamodule": 5, "callbacks": 5, "checkpointing": 5, "logfiles": 5, "slurm": 5,
    "runs": 6, "strategies": 6, "preview": 6, "doctor": 6, "exporting": 6, "comparing": 6, "stopping": 6,
    "trainer": 7, "parsing": 7,
    "cli": 8,
    "__main__": 9,
}  # fmt: skip
LIGHTNING_FROM = RANK["module"]
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in the file it does so; type-checking ones too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rank(name: str) -> int:
    assert name in RANK, f"lit_sft/{name} has no rank: give it one in {Path(__file__).name}"
    return RANK[name]


def problems(path: Path) -> list[str]:
    top = path.relative_to(ROOT).parts[0].removesuffix(".py")
    own = rank(top)
    found = []
    for name in imported(path):
        package, *rest = name.split(".")
        if package == "lightning" and own < LIGHTNING_FROM:
            found.append(f"{path.name} must stay free of lightning")
        here = ".".join(("lit_sft", *path.relative_to(ROOT).parts[:-1])) + "."
        inside = (
            top == "demo" and rest[:1] == ["demo"] or path.name == "__init__.py" and name.startswith(here)
        )  # one stage
        if package == "lit_sft" and rest and rest[0] != "__version__" and not inside and rank(rest[0]) >= own:
            found.append(f"{path.name} may not import {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    assert problems(path) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("data/render.py", "from lit_sft.data.formats import to_conversation"),
        ("model/loss.py", "import lightning"),
        ("module.py", "def f():\n    from lit_sft import cli"),
    ],
)
def test_the_test_can_fail(file, line, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    assert len(problems(path)) == 1


def test_budgets():
    """Files stay within 300 lines and functions within 60: a reader's afternoon."""
    long = []
    for path in FILES:
        text = path.read_text()
        if text.count("\n") > 300:
            long.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__" and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.name}: {node.name}")
    assert long == []
