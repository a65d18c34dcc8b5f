"""Recipes: the config files that come with the package.

Only the standard library is imported here, so that listing them takes no time.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def recipes() -> dict[str, Path]:
    """Lists the recipes, by name, with their files."""
    found: dict[str, Path] = {}
    for folder in reversed(_folders()):
        for path in sorted(folder.glob("*.yaml")):
            found[path.stem] = path
    return dict(sorted(found.items()))


def description(path: Path) -> str:
    """Returns the first sentence of the comment at the top of a recipe."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words += line.removeprefix("#").split()
    sentence, end, _ = " ".join(words).partition(". ")
    return f"{sentence}." if end else sentence


def _folders() -> tuple[Path, Path]:
    """Returns the folder of recipes of an installed package, and that of a repository."""
    installed = Path(str(resources.files("lit_sft").joinpath("configs")))
    return installed, Path(__file__).parents[1] / "configs"
