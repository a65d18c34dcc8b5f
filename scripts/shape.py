"""Prints figures of the code: sizes, density of statements, complexity, foreign private attributes.

    python scripts/shape.py [FOLDER]

Blank lines, comments and docstrings are no code lines. Densities are per 1,000 code lines. The
complexity of a function is 1 plus its branches, loops, handlers, conditional expressions,
assertions, comprehensions and additional operands of `and` and `or`. The figures are no goals. They
show where to look.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.Assert, *COMPREHENSIONS)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPLEX = 12
LONG_LINE = 100
DENSITIES = (
    "comprehensions",
    "conditional expressions",
    "assignment expressions",
    "tuple assignments",
    "comments above",
    "comments behind",
)


class Shape:
    """Figures of all files in a folder."""

    def __init__(self) -> None:
        self.num_files = 0
        self.counts: Counter[str] = Counter()
        self.lengths: list[int] = []
        self.complexities: list[tuple[int, str]] = []
        self.private: Counter[str] = Counter()
        self.sizes: list[tuple[int, str]] = []

    def add(self, path: Path) -> None:
        """Counts one file."""
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        self.num_files += 1
        code_lines = self._count_lines(text, docstring_lines(tree))
        self.counts["code lines"] += code_lines
        self.sizes.append((code_lines, str(path)))
        for node in ast.walk(tree):
            self._count_statement(node)
            if is_private_touch(node):
                self.private[str(path)] += 1
            if isinstance(node, FUNCTIONS):
                self.lengths.append((node.end_lineno or node.lineno) - node.lineno + 1)
                self.complexities.append((complexity(node), f"{path}:{node.name}"))

    def _count_lines(self, text: str, docstrings: set[int]) -> int:
        with_code: set[int] = set()
        comments: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments.add(token.start[0])
            elif token.string.strip() and token.type not in (tokenize.ENCODING, tokenize.ENDMARKER):
                with_code.update(range(token.start[0], token.end[0] + 1))
        with_code -= docstrings
        self.counts["comments above"] += len(comments - with_code)
        self.counts["comments behind"] += len(comments & with_code)
        self.counts["long lines"] += sum(len(line) > LONG_LINE for line in text.splitlines())
        return len(with_code)

    def _count_statement(self, node: ast.AST) -> None:
        if isinstance(node, COMPREHENSIONS):
            self.counts["comprehensions"] += 1
        elif isinstance(node, ast.IfExp):
            self.counts["conditional expressions"] += 1
        elif isinstance(node, ast.NamedExpr):
            self.counts["assignment expressions"] += 1
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            self.counts["tuple assignments"] += isinstance(node.value, ast.Tuple)

    def report(self) -> Iterator[str]:
        """Returns the lines to print."""
        lengths = sorted(self.lengths)
        yield f"{self.num_files} files, {self.counts['code lines']:,} code lines"
        yield (
            f"{len(lengths)} functions: median {lengths[len(lengths) // 2]} lines, "
            f"90th percentile {lengths[int(0.9 * len(lengths))]}, longest {lengths[-1]}"
        )
        for name in DENSITIES:
            yield f"{name}: {1000 * self.counts[name] / self.counts['code lines']:.0f} per 1,000"
        most = sorted(self.complexities, reverse=True)
        above = sum(value > COMPLEX for value, _ in most)
        yield f"{above} functions above a complexity of {COMPLEX}; the most complex:"
        yield from (f"  {value} {name}" for value, name in most[:5])
        yield f"lines over {LONG_LINE} columns: {self.counts['long lines']}"
        yield (
            f"private attributes of others: {sum(self.private.values())} in {len(self.private)}"
            " files"
        )
        yield from (f"  {count} {name}" for name, count in self.private.most_common())
        yield "largest files:"
        yield from (f"  {size} {name}" for size, name in sorted(self.sizes, reverse=True)[:5])


def docstring_lines(tree: ast.AST) -> set[int]:
    """Returns the lines of all docstrings, including those of attributes."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def complexity(function: ast.AST) -> int:
    """Returns the complexity of a function."""
    total = 1
    for node in ast.walk(function):
        total += isinstance(node, BRANCHES)
        if isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
    return total


def is_private_touch(node: ast.AST) -> bool:
    """Whether a node imports a private name, or reads a private attribute of another object."""
    if isinstance(node, ast.ImportFrom):
        foreign = not (node.module or "").startswith("lit_sft")
        return foreign and any(alias.name.startswith("_") for alias in node.names)
    if (
        not isinstance(node, ast.Attribute)
        or node.attr.startswith("__")
        or not node.attr.startswith("_")
    ):
        return False
    owner = ast.unparse(node.value)
    return owner not in ("self", "cls", "super()") and node.attr not in ("_exit", "_replace")


def main() -> None:
    """Prints the report."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "lit_sft")
    shape = Shape()
    for path in sorted(folder.rglob("*.py")):
        shape.add(path)
    print("\n".join(shape.report()))


if __name__ == "__main__":
    main()
